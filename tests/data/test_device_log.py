"""Batches gathered on the devices are those that the host gathers, bit by bit."""

import jax
import numpy as np
import pytest
from random_logs import SPEC, make_log, same_bits

from mmrf_jax.data import device_log, sessions
from mmrf_jax.parallel.partitioner import Partitioner

NOTHING = (np.zeros(1),) * 3


@pytest.mark.parametrize("t", [1, 3, 12])
def test_a_gathered_batch_is_the_hosts(t):
    log, partitioner = make_log(t, 60), Partitioner()
    log.feedback[0, 0, 0] = -0.0  # a zero with a sign, as the bits are compared
    held = device_log.put(log, SPEC, NOTHING, partitioner)
    index, wanted = held.segment_index(t), sessions.segment_index(log, t)
    np.testing.assert_array_equal(index[:, :2], wanted)
    order = np.random.default_rng(0).permutation(len(index))
    gather = jax.jit(device_log.gather, static_argnums=(0, 3, 4))
    found = gather(held.layout, held.rows, index[order], t, partitioner)
    same_bits(found, sessions.gather_segments(log, wanted[order], t))


def test_the_first_sessions_come_back():
    log = make_log(1, 40, scores=False)
    held = device_log.put(log, SPEC, NOTHING, Partitioner())
    found, wanted = held.head(7), sessions.select_sessions(log, np.arange(7))
    assert found.scores is None and held.head(99).num_sessions == 40
    for name in ("user_id", "date", "profile", "history_videos", "history_mask", "terminated", "offsets"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    for name in ("context", "candidates", "slate", "log_propensity", "feedback"):
        assert getattr(found, name).tobytes() == getattr(wanted, name).tobytes(), name


def test_bytes_of_a_log_are_those_of_its_layout():
    log = make_log(1, 64, scores=False)
    held = device_log.put(log, SPEC, NOTHING, Partitioner())
    session, request = held.layout.bytes_per_session, held.layout.bytes_per_request
    rows = held.rows
    assert rows.sessions.nbytes == device_log.padded_size(64) * session == 64 * session
    assert rows.requests.nbytes + rows.exposures.nbytes == device_log.padded_size(log.num_requests) * request


@pytest.mark.parametrize(("number", "size"), [(1, 1), (8, 8), (9, 10), (1000, 1024), (897, 1024), (896, 896)])
def test_sizes_are_rounded_up_to_three_bits(number, size):
    assert device_log.padded_size(number) == size


def test_two_devices_gather_the_same_and_send_no_log(run_python):
    """And have the same steps, batches split over both."""
    run_python(SCRIPT, devices=2)


SCRIPT = """
import re, sys
sys.path.insert(0, "tests/data")
import jax, numpy as np
from random_logs import SPEC, make_log, same_bits
from mmrf_jax.data import device_log, sessions
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import batches, configs, on_device

log, partitioner = make_log(3, 61), Partitioner()
assert partitioner.num_devices == 2
held = device_log.put(log, SPEC, (np.zeros(1),) * 3, partitioner)
index = held.segment_index(3)[:40]
gather = jax.jit(device_log.gather, static_argnums=(0, 3, 4)).lower(
    held.layout, held.rows, partitioner.replicate(index), 3, partitioner
).compile()
found = gather(held.rows, partitioner.replicate(index))
assert found.candidates.sharding.is_equivalent_to(partitioner.data_sharding, 3)
same_bits(found, sessions.gather_segments(log, sessions.segment_index(log, 3)[:40], 3))
text = gather.as_text()
assert "reduce-scatter" in text and "all-gather" not in text and "all-reduce" not in text
rows = max(len(x) for x in held.rows) // 2
assert not re.search(rf"\\[{rows},\\d+\\]\\S* (all|reduce|collective)", text)
assert held.head(5).num_requests == log.offsets[5]

run = configs.override(configs.Run(), train={"batch": 8, "segment": 3}, feedback={"batch": 4})
host, devices = batches.InMemoryBatches(run, log, partitioner), on_device.DeviceBatches(run, held, partitioner)
for part in ("feedback", "train"):
    rates = np.linspace(1.0, 0.5, 2 * host.per_epoch(part), dtype=np.float32)
    with host.steps(part, 1, 3, rates) as wanted, devices.steps(part, 1, 3, rates) as found:
        for (batch, rate), (other, same) in zip(wanted, found, strict=True):
            same_bits(other, batch)
            assert same == rate and same.sharding == partitioner.replicated_sharding
            assert other.slate.sharding.is_equivalent_to(batch.slate.sharding, 3)
same_bits(list(devices.held_out(4, 2, 1)), list(host.held_out(4, 2, 1)))
"""
