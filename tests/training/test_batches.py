"""A round's log as batches: held in memory and read from disk, they say the same of it."""

import dataclasses

import jax
import numpy as np
import pytest
from random_logs import SPEC, make_log, same_bits

from mmrf_jax.data import device_log, records, sessions
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import batches, configs, on_device

DISCOUNT, SESSIONS = 0.9, 900


def lr_scale(progress: float) -> float:
    return 1.0 - 0.3 * progress


@pytest.fixture(scope="module")
def log():
    """A user for each session."""
    return dataclasses.replace(make_log(2, SESSIONS), user_id=np.arange(SESSIONS, dtype=np.int32))


@pytest.fixture(scope="module")
def blocks(log, tmp_path_factory):
    folder = tmp_path_factory.mktemp("log") / "log"
    records.write_log(log, folder, SPEC)
    return records.Blocks(folder)


def config(share=1.0, batch=16):
    return configs.override(
        configs.Run(seed=4), train={"batch": 32, "segment": 3}, feedback={"batch": batch, "log_fraction": share}
    )


@pytest.fixture
def both(log, blocks):
    return batches.InMemoryBatches(config(), log, Partitioner()), batches.StreamedBatches(
        config(), blocks, Partitioner(), DISCOUNT, log.feedback.shape[-1]
    )


def test_an_example_is_like_any_batch(both):
    """Programs are compiled for it before there is a log."""
    example = batches.example_batch(SPEC, 32, 3)
    for data in both:
        batch = data.get("train", 0, 0)
        assert jax.tree.structure(batch) == jax.tree.structure(example)
        for (path, x), y in zip(jax.tree.leaves_with_path(batch), jax.tree.leaves(example), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype), jax.tree_util.keystr(path)


def test_they_know_the_same_of_a_log(both):
    held, streamed = both
    assert (held.sessions, held.requests) == (streamed.sessions, streamed.requests)
    for here, there in zip(held.feedback_statistics(DISCOUNT), streamed.feedback_statistics(DISCOUNT), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-9)
    for part in ("feedback", "train"):
        assert held.per_epoch(part) == streamed.per_epoch(part)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_fit_never_sees_what_is_held_out(log, blocks, share):
    seen = []
    for data in (
        batches.InMemoryBatches(config(share), log, Partitioner()),
        batches.StreamedBatches(config(share), blocks, Partitioner(), DISCOUNT, log.feedback.shape[-1]),
    ):
        fitted = {int(u) for at in range(3 * data.per_epoch("feedback")) for u in data.get("feedback", 0, at).user_id}
        held = {int(u) for batch in data.held_out(4, 999, 1) for u in batch.user_id}
        assert held == set(range(19, SESSIONS, 20)) and not held & fitted
        seen.append(fitted)
    # Both fit the same sessions, up to those that a few passes leave out.
    assert len(seen[0] ^ seen[1]) < 0.1 * len(seen[0]) and len(seen[0]) == pytest.approx(
        share * 0.95 * SESSIONS, rel=0.15
    )


def test_rounds_epochs_and_parts_have_orders_of_their_own(both):
    for data in both:

        def users(*where, data=data):
            return data.get(*where).user_id.tolist()

        first = users("train", 0, 0)
        assert users("train", 0, 0) == first and len(first) == 32 and len(users("feedback", 0, 0)) == 16
        assert users("train", 1, 0) != first != users("train", 0, data.per_epoch("train"))
        assert users("feedback", 0, 0) != first[:16]


def test_all_of_a_log_is_seen_in_a_few_passes(log, both):
    for data in both:
        seen = {int(u) for at in range(4 * data.per_epoch("train")) for u in data.get("train", 0, at).user_id}
        assert len(seen) > 0.99 * SESSIONS


def test_a_log_too_small_for_its_batches_is_refused(log, tmp_path):
    few = sessions.select_sessions(log, np.arange(20))
    records.write_log(few, tmp_path / "log", SPEC)
    with pytest.raises(ValueError, match=r"20 sessions give no segment to some of 32 slots.*--config.train.batch"):
        batches.StreamedBatches(
            config(), records.Blocks(tmp_path / "log"), Partitioner(), DISCOUNT, log.feedback.shape[-1]
        )
    one = sessions.select_sessions(log, np.arange(2))
    with pytest.raises(ValueError, match="fewer than one batch of 32"):
        batches.InMemoryBatches(config(), one, Partitioner()).per_epoch("train")


def test_a_phase_goes_on_from_any_of_its_steps(both):
    """Its batches are those of an uninterrupted phase, and `position` counts the ones before a restart too."""
    for data in both:
        per_epoch = data.per_epoch("train")
        done = per_epoch - 1
        with batches.PhaseIterator(data, "train", 1, 2, done, lr_scale) as phase:
            assert (phase.position, phase.total) == (done, 2 * per_epoch)
            for at, (batch, factor) in zip((done, done + 1), phase, strict=False):
                assert (phase.position, factor) == (at + 1, np.float32(lr_scale(at / (2 * per_epoch))))
                np.testing.assert_array_equal(batch.slate, data.get("train", 1, at).slate)
        with batches.PhaseIterator(data, "train", 1, 2, 2 * per_epoch, lr_scale) as phase:
            assert not list(phase)


def test_a_log_on_the_devices_gives_the_same_steps_and_waits_for_no_host(log):
    """From any step on; nothing is copied to the devices or from them within an epoch."""
    partitioner = Partitioner()
    held = batches.InMemoryBatches(config(), log, partitioner)
    known = held.feedback_statistics(DISCOUNT)
    there = on_device.DeviceBatches(config(), device_log.put(log, SPEC, known, partitioner), partitioner)
    assert (there.sessions, there.requests, there.feedback_statistics(DISCOUNT)) == (
        held.sessions,
        held.requests,
        known,
    )
    for part in ("feedback", "train"):
        per_epoch = there.per_epoch(part)
        assert per_epoch == held.per_epoch(part)
        for done in (0, per_epoch - 2):
            with (
                batches.PhaseIterator(held, part, 1, 2, done, lr_scale) as wanted,
                batches.PhaseIterator(there, part, 1, 2, done, lr_scale) as found,
            ):
                for _ in range(4):
                    (batch, factor), (same, same_factor) = next(wanted), next(found)
                    assert found.position == wanted.position and float(same_factor) == float(factor)
                    same_bits(same, batch)
    with batches.PhaseIterator(there, "train", 1, 1, 0, lr_scale) as phase:
        next(phase)
        with jax.transfer_guard("disallow"):
            assert len(list(phase)) == there.per_epoch("train") - 1
    for here, other in zip(there.held_out(4, 3, 1), held.held_out(4, 3, 1), strict=True):
        same_bits(here, other)


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        (13, [[0, 2, 4], [6, 8, 10]]),  # every second row
        (4, [[0, 1, 2]]),
        (2, [[0, 1, 0]]),
        (0, []),
    ],
)
def test_batches_are_spread_over_rows_and_a_short_one_is_padded(log, rows, chosen):
    index = sessions.segment_index(log, 3)[:rows]
    found = list(batches.spread_batches(log, index, 3, size=3, most=2))
    assert len(found) == len(chosen)
    for batch, numbers in zip(found, chosen, strict=True):
        np.testing.assert_array_equal(batch.user_id, log.user_id[index[numbers, 0]])
