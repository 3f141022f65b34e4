"""Boosting: features against a loop over exposures, the choice of trees, and a signal that it must find."""

import dataclasses

import numpy as np
import pytest
import random_logs

from mmrf_jax import types
from mmrf_jax.baselines import boosting
from mmrf_jax.baselines.popularity import PRIOR_EXPOSURES
from mmrf_jax.data import sessions

V = random_logs.SCHEMA.num_videos
MEASURE = lambda users, scores, labels: float(np.mean((scores > 0.5) == labels))


def make_items() -> types.Items:
    rng = np.random.default_rng(3)
    return types.Items(
        author=rng.integers(0, 5, V), tag=rng.integers(0, 4, V), duration=rng.uniform(5, 60, V).astype(np.float32),
        features=rng.normal(size=(V, 3)).astype(np.float32), embedding_id=np.arange(V), num_embeddings=V,
        num_authors=5, num_tags=4,
    )  # fmt: skip


def make_log(seed: int, count: int = 60, days=(1, 2, 3)):
    """A log of 0/1 feedback on given days."""
    log = random_logs.make_log(seed, count)
    feedback = (log.feedback > 0.5).astype(np.float32)
    return dataclasses.replace(log, date=np.resize(np.array(days, np.int32), count), feedback=feedback)


def one_by_one(log):
    """(day, video, click, long_view) of each exposure."""
    for n in range(log.num_sessions):
        for r in range(log.offsets[n], log.offsets[n + 1]):
            for slot in np.flatnonzero(log.slate[r] >= 0):
                yield n, r, log.date[n], log.candidates[r, log.slate[r, slot]], log.feedback[r, slot, :2]


def test_features_equal_a_loop_over_exposures():
    log, past, items = make_log(0), make_log(1), make_items()
    got = boosting.features(log, items, [past, log])
    seen = [(day, video, label) for source in (past, log) for _, _, day, video, label in one_by_one(source)]
    rows = list(one_by_one(log))
    assert len(rows) == len(got)
    for row, (n, r, day, video, _) in zip(got, rows, strict=True):
        expected = []
        before = [np.float64(label) for d, _, label in seen if d < day]
        overall = np.mean(before, axis=0) if before else np.full(2, 0.5)
        for key in (np.arange(V), items.author, items.tag):
            labels = [label for d, v, label in seen if d < day and key[v] == key[video]]
            total = np.sum(labels, axis=0) if labels else np.zeros(2)
            expected += [*(total + PRIOR_EXPOSURES * overall) / (len(labels) + PRIOR_EXPOSURES), np.log1p(len(labels))]
        expected += [items.duration[video], *items.features[video], *log.context[r], *log.profile[n]]
        np.testing.assert_allclose(row, expected, rtol=1e-5)


def test_features_do_not_see_their_own_day_or_later():
    log, items = make_log(0, days=(1, 2)), make_items()
    before = boosting.features(log, items, [log])
    late = log.date[sessions.exposure_index(log)[0]] == 2
    changed = log.feedback.copy()
    session = np.repeat(np.arange(log.num_sessions), np.diff(log.offsets))
    changed[log.date[session] >= 2] = 1.0 - changed[log.date[session] >= 2]
    after = boosting.features(dataclasses.replace(log, feedback=changed), items, [log])
    np.testing.assert_array_equal(before, after)
    assert (before[late][:, 2] > 0).any() and not (before[log.date[sessions.exposure_index(log)[0]] == 1][:, 2]).any()


@pytest.mark.parametrize("chosen", [10, 70])
def test_the_number_of_trees_is_the_best_of_the_validation_log(chosen):
    logs = [make_log(seed, days=days) for seed, days in ((5, (1, 2)), (6, (3,)), (7, (4,)))]
    looks = []

    def measure(users, scores, labels):
        looks.append(scores)
        return 1.0 if len(looks) % 10 == chosen // 10 else 0.0

    got = boosting.scores(logs[0], logs[1], {"again": logs[1], "other": logs[2]}, make_items(), measure)
    assert len(looks) == 20  # every ten of a hundred trees, for two signals
    assert set(got) == {"again", "other"} and set(got["other"]) == {"click", "long_view"}
    np.testing.assert_allclose(got["again"]["click"], looks[chosen // 10 - 1], rtol=1e-6)


def test_finds_what_decides_a_click():
    items = make_items()

    def log(seed):
        made = make_log(seed, 200)
        videos = np.take_along_axis(made.candidates, np.maximum(made.slate, 0), axis=1)
        made.feedback[..., 0] = (items.duration[videos] > 30) & (made.slate >= 0)
        return made

    train, valid, test = log(1), log(2), log(3)
    got = boosting.scores(train, valid, {"test": test}, items, MEASURE)["test"]["click"]
    _, request, slot = sessions.exposure_index(test)
    assert np.mean((got > 0.5) == (test.feedback[request, slot, 0] > 0.5)) > 0.98
