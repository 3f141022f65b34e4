"""Boosting: features against a loop over exposures, the choice of trees, and a signal that it must find."""

import dataclasses

import numpy as np
import pytest
import random_logs

from mmrf_jax.agents import boosting
from mmrf_jax.data import sessions, statistics
from mmrf_jax.signals import SHORT_VIDEO

V = random_logs.SPEC.num_videos


def MEASURE(users, scores, labels):
    return float(np.mean((scores > 0.0) == labels))


MEANS = 4 * (len(statistics.FREQUENT) + 1)  # of video, author, tag and user


def make_log(seed: int, count: int = 60, days=(1, 2, 3)):
    """A log of 0/1 feedback, and watch time, on given days."""
    log = random_logs.make_log(seed, count)
    feedback = (log.feedback > 0.5).astype(np.float32)
    feedback[..., SHORT_VIDEO.index("watch_time")] = 30.0 * log.feedback[..., SHORT_VIDEO.index("watch_time")]
    return dataclasses.replace(log, date=np.resize(np.array(days, np.int32), count), feedback=feedback)


def score(train, valid, tests, items, measure, **options):
    """`boosting.scores` of logs."""
    past = [train, valid]
    at_train, at_valid = (
        boosting.table(train, items, SHORT_VIDEO, [train]),
        boosting.table(valid, items, SHORT_VIDEO, past),
    )
    features = {name: boosting.features(log, items, SHORT_VIDEO, past) for name, log in tests.items()}
    return boosting.scores(SHORT_VIDEO, at_train, at_valid, features, measure, **options)


def one_by_one(log):
    """(session, request, day, video, user, labels) of each exposure."""
    at = [SHORT_VIDEO.index(name) for name in statistics.FREQUENT]
    for n in range(log.num_sessions):
        for r in range(log.offsets[n], log.offsets[n + 1]):
            for slot in np.flatnonzero(log.slate[r] >= 0):
                label = np.float64(log.feedback[r, slot][at])
                label[-1] = np.log1p(label[-1])
                yield n, r, log.date[n], log.candidates[r, log.slate[r, slot]], log.user_id[n], label


def test_features_equal_a_loop_over_exposures():
    log, past, items = make_log(0), make_log(1), random_logs.make_items()
    got = boosting.features(log, items, SHORT_VIDEO, [past, log])
    seen = [row[2:] for source in (past, log) for row in one_by_one(source)]
    rows = list(one_by_one(log))
    assert len(rows) == len(got)
    for row, (n, r, day, video, user, _) in zip(got, rows, strict=True):
        expected = []
        before = [label for d, _, _, label in seen if d < day]
        overall = np.mean(before, axis=0) if before else np.full(len(statistics.FREQUENT), 0.5)
        names = [lambda v, _, key=key: key[v] for key in (np.arange(V), items.author, items.tag)]
        for name, prior in zip([*names, lambda _, u: u], (20.0, 20.0, 20.0, 5.0), strict=True):
            labels = [label for d, v, u, label in seen if d < day and name(v, u) == name(video, user)]
            total = np.sum(labels, axis=0) if labels else np.zeros(len(overall))
            expected += [*(total + prior * overall) / (len(labels) + prior), np.log1p(len(labels))]
        expected += [items.duration[video], *items.features[video], *log.context[r], *log.profile[n]]
        np.testing.assert_allclose(row, expected, rtol=1e-5)


def test_a_table_holds_the_exposures_of_a_log_or_a_sample_of_them(monkeypatch):
    log, items = make_log(0), random_logs.make_items()
    full = boosting.table(log, items, SHORT_VIDEO, [log], seed=0)
    np.testing.assert_array_equal(full.features, boosting.features(log, items, SHORT_VIDEO, [log]))
    for got, (_, _, _, video, user, label) in zip(
        zip(full.user, full.video, full.feedback[:, 0], strict=True), one_by_one(log), strict=True
    ):
        assert got == (user, video, label[0])
    monkeypatch.setattr(boosting, "_MAX_ROWS", 40)
    some = boosting.table(log, items, SHORT_VIDEO, [log], seed=0)
    every = {tuple(row) for row in np.column_stack([full.user, full.video, full.features, full.feedback])}
    assert len(some.user) == 40
    assert {tuple(row) for row in np.column_stack([some.user, some.video, some.features, some.feedback])} <= every
    assert len(boosting.table(log, items, SHORT_VIDEO, [log]).user) == len(full.user)  # without a seed, all


def test_features_do_not_see_their_own_day_or_later():
    log, items = make_log(0, days=(1, 2)), random_logs.make_items()
    before = boosting.features(log, items, SHORT_VIDEO, [log])
    late = log.date[sessions.exposure_index(log)[0]] == 2
    session = np.repeat(np.arange(log.num_sessions), np.diff(log.offsets))
    changed = np.where((log.date[session] >= 2)[:, None, None], 1.0 - log.feedback, log.feedback)
    after = boosting.features(dataclasses.replace(log, feedback=changed), items, SHORT_VIDEO, [log])
    np.testing.assert_array_equal(before, after)
    counts = before[:, len(statistics.FREQUENT)]
    assert (counts[late] > 0).any() and not counts[~late].any()


def test_scores_do_not_move_with_the_feedback_of_the_test_log():
    logs = [make_log(seed, days=days) for seed, days in ((5, (1, 2)), (6, (3,)), (7, (4, 5)))]
    other = dataclasses.replace(logs[2], feedback=np.where(logs[2].slate[..., None] >= 0, 1.0 - logs[2].feedback, 0.0))
    got = score(logs[0], logs[1], {"one": logs[2], "other": other}, random_logs.make_items(), MEASURE, rounds=25)
    for name, scores in got["one"].items():
        np.testing.assert_array_equal(scores, got["other"][name])


@pytest.mark.parametrize("chosen", [25, 50])
def test_the_number_of_trees_is_the_best_of_the_validation_log(chosen):
    logs = [make_log(seed, days=days) for seed, days in ((5, (1, 2)), (6, (3,)), (7, (4,)))]
    evaluations = []

    def measure(users, scores, labels):
        evaluations.append(scores)
        return 1.0 if len(evaluations) % 3 == chosen // 25 else 0.0

    got = score(logs[0], logs[1], {"again": logs[1], "other": logs[2]}, random_logs.make_items(), measure, rounds=75)
    assert len(evaluations) == 3 * len(boosting.FREQUENT)  # every 25 of 75 trees
    assert set(got) == {"again", "other"} and set(got["other"]) == set(boosting.FREQUENT)
    np.testing.assert_allclose(got["again"]["click"], evaluations[chosen // 25 - 1], rtol=1e-6)


def test_finds_what_decides_a_click_and_leaves_out_what_never_happens():
    items = random_logs.make_items()

    def log(seed):
        made = make_log(seed, 200)
        videos = np.take_along_axis(made.candidates, np.maximum(made.slate, 0), axis=1)
        made.feedback[..., 0] = (items.duration[videos] > 30) & (made.slate >= 0)
        made.feedback[..., SHORT_VIDEO.index("like")] = 0.0
        return made

    train, valid, test = log(1), log(2), log(3)
    got = score(train, valid, {"test": test}, items, MEASURE, rounds=100)["test"]
    assert "like" not in got
    _, request, slot = sessions.exposure_index(test)
    assert np.mean((got["click"] > 0.0) == (test.feedback[request, slot, 0] > 0.5)) > 0.98
