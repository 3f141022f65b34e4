"""Scored exposures line up with the log's, and the offline table is as computed by hand."""

import numpy as np
import pytest
import random_logs

from mmrf_jax.data import sessions
from mmrf_jax.metrics import offline
from mmrf_jax.signals import SHORT_VIDEO


def shown_videos(data):
    return np.take_along_axis(data.candidates, data.slate, axis=-1)  # [B, T+1, K]


@pytest.mark.parametrize("num_requests", [1, 2, 4, 20])
@pytest.mark.parametrize("batch", [7, 512])
def test_scored_rows_are_the_exposures_of_the_log(num_requests, batch):
    log = random_logs.make_log(0, 25)
    shapes, done = [], []

    def score(data):
        shapes.append(data.slate.shape)
        video = shown_videos(data).astype(np.float32)
        request = np.broadcast_to(data.context[..., :1], video.shape)
        return np.stack([video, request], axis=-2)  # [B, T+1, N, K]

    rows = offline.score_log(score, log, num_requests=num_requests, batch=batch, progress=done.append)
    expected = offline.exposures(log)
    assert len(expected.video) == sessions.num_exposures(log) > 25
    np.testing.assert_array_equal(rows.user_id, expected.user_id)
    np.testing.assert_array_equal(rows.video, expected.video)
    np.testing.assert_array_equal(rows.feedback, expected.feedback)
    assert rows.scores.shape == (len(rows.video), 2) and expected.scores.shape == (len(rows.video), 0)
    np.testing.assert_array_equal(rows.scores[:, 0], expected.video)
    np.testing.assert_array_equal(rows.scores[:, 1], log.context[sessions.exposure_index(log)[1], 0])
    segments = len(sessions.segment_index(log, num_requests))
    assert set(shapes) == {(batch, num_requests + 1, random_logs.SPEC.slate)}  # one trace serves all
    assert len(done) == len(shapes) == -(-segments // batch) and done[-1] == segments


@pytest.mark.parametrize("number", [2, 3, 100])
def test_parts_of_a_log_are_scored_apart(number):
    """As several processes do; with 100 of them some have nothing to score."""
    log = random_logs.make_log(0, 25)

    def score(data):
        return shown_videos(data).astype(np.float32)[..., None, :]

    whole = offline.score_log(score, log, num_requests=2)
    each = -(-len(sessions.segment_index(log, 2)) // number)
    parts = [
        offline.score_log(score, log, num_requests=2, batch=7, part=slice(n * each, (n + 1) * each))
        for n in range(number)
    ]
    for name in ("user_id", "video", "feedback", "scores"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, name))


def test_exposures_by_hand():
    log = random_logs.make_log(1, 12)
    rows = offline.exposures(log)
    expected = [
        (log.user_id[s], log.candidates[r, c], log.feedback[r, k])
        for s in range(log.num_sessions)
        for r in range(log.offsets[s], log.offsets[s + 1])
        for k, c in enumerate(log.slate[r])
        if c >= 0
    ]
    users, videos, feedback = zip(*expected, strict=True)
    np.testing.assert_array_equal(rows.user_id, users)
    np.testing.assert_array_equal(rows.video, videos)
    np.testing.assert_array_equal(rows.feedback, feedback)


SIGNALS = ("like", "click", "watch_time")  # the main agent last; click is not the first


def make_rows(user, click, seconds, *scores):
    feedback = np.zeros((len(user), len(SHORT_VIDEO)), np.float32)
    feedback[:, SHORT_VIDEO.index("click")] = click
    feedback[:, SHORT_VIDEO.index("watch_time")] = seconds
    scores = np.array(scores, np.float32).T if scores else np.zeros((len(user), 0), np.float32)
    return offline.Rows(np.array(user, np.int32), np.arange(len(user), dtype=np.int32), feedback, scores)


def make_test_rows():
    """User 1 of three rows and user 2 of two; user 3 has clicked all and so has no AUC of clicks."""
    return make_rows(
        [1, 1, 1, 2, 2, 3, 3],
        [1, 0, 0, 0, 1, 1, 1],
        [9, 5, 1, 4, 8, 2, 2],
        [0, 0, 0, 0, 0, 0, 0],  # like
        [3, 2, 1, 1, 2, 0, 1],  # click: ranks both users' clicks first
        [2, 3, 1, 1, 0, 5, 6],  # main: one of two pairs of user 1 right, the pair of user 2 wrong
    )


TRAIN = make_rows([1, 1, 2], [0, 0, 0], [4, 8, 4])  # medians of 6 and 4 seconds; user 3 is unknown


def measure(rows, signals=SIGNALS, baselines=None, draws=1000, duration=None):
    duration = np.full(len(rows.video), 30.0) if duration is None else duration
    return offline.metrics(rows, SHORT_VIDEO, signals, TRAIN, duration, baselines, draws)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(offline, "MIN_USERS", 2)


def test_gauc_by_hand_served_and_own(few):
    result = measure(make_test_rows())
    assert set(result) >= {*SHORT_VIDEO.binary_names, "watch_time_median", "watch_time_xauc"}
    click = result["click"]
    assert click["eligible_users"] == 2
    assert click["gauc"] == pytest.approx((3 * 0.5 + 2 * 0.0) / 5)
    assert click["gauc_agent"] == pytest.approx(1.0)
    # Half of a bootstrap's samples of two users hold one of them twice: the interval goes from one to the other.
    assert click["ci95"] == [0.0, 0.5]
    assert "against" not in click and "gauc_agent" not in result["long_view"]


def test_own_scores_are_those_of_the_named_agent(few):
    rows = make_test_rows()
    other = measure(rows, ("click", "like", "watch_time"))["click"]
    assert other["gauc_agent"] == 0.5  # the constant column
    alone = measure(rows, ("watch_time",))["click"]
    assert alone["gauc"] == other["gauc"] and "gauc_agent" not in alone


def test_watch_time_by_hand(few):
    result = measure(make_test_rows())
    median, xauc = result["watch_time_median"], result["watch_time_xauc"]
    # Longer than the training median: 9 of (9, 5, 1), 8 of (4, 8).
    assert median["eligible_users"] == 2 and median["users_without_training_rows"] == 1
    assert median["gauc"] == pytest.approx((3 * 0.5 + 2 * 0.0) / 5)
    # Pairs of different seconds: user 1 has 9 > 5 wrong, 9 > 1 and 5 > 1 right; user 2 one, wrong; user 3 none.
    assert xauc["eligible_users"] == 2 and xauc["gauc"] == pytest.approx((3 * 2 / 3 + 2 * 0.0) / 5)
    assert xauc["ci95"] == pytest.approx([0.0, 2 / 3])


def test_against_a_baseline_by_hand(few):
    popularity = {"click": np.array([1, 1, 0, 1, 2, 0, 0]), "watch_time": np.array([3, 2, 1, 1, 2, 0, 0])}
    result = measure(make_test_rows(), SIGNALS, {"popularity": popularity})
    against = result["click"]["against"]["popularity"]
    # User 1: a tie and a pair right, .75; user 2: 1. The click agent has 1 and 1.
    assert against["gauc"] == pytest.approx((3 * 0.75 + 2 * 1.0) / 5)
    assert against["diff"] == pytest.approx(1.0 - 0.85)
    assert against["diff_ci95"] == pytest.approx([0.0, 0.25])
    # No agent of the median: the served score is compared with, and the baseline's watch time stands for the signal.
    median = result["watch_time_median"]["against"]["popularity"]
    assert median["gauc"] == pytest.approx(1.0) and median["diff"] == pytest.approx(0.3 - 1.0)
    assert median["diff_ci95"] == pytest.approx([-1.0, -0.5])
    assert result["watch_time_xauc"]["against"]["popularity"]["diff"] == pytest.approx(0.4 - 1.0)
    assert "against" not in result["like"]  # which the baseline does not score


def test_by_duration_by_hand(few):
    # User 2 has the videos of 10 s in the wrong order; those of 60 s are compared with each other alone.
    duration = np.tile([10.0, 10.0, 60.0, 60.0], 2)
    rows = make_rows([1] * 4 + [2] * 4, [1, 0] * 4, [5] * 8, [8, 7, 2, 1, 7, 8, 2, 1])
    short, long = measure(rows, ("watch_time",), duration=duration)["click"]["by_duration"]
    assert (short["duration"][1], short["gauc"], short["eligible_users"]) == (10.0, 0.5, 2)
    assert (long["duration"][1], long["gauc"], long["eligible_users"]) == (60.0, 1.0, 2)
    rows.feedback[4:6, SHORT_VIDEO.index("click")] = 0  # user 2 is no longer eligible among the short ones
    short, long = measure(rows, ("watch_time",), duration=duration)["click"]["by_duration"]
    assert (short["gauc"], short["eligible_users"], long["gauc"]) == (None, 1, 1.0)


def test_no_figure_below_the_least_number_of_users(monkeypatch):
    popularity = {"popularity": {"click": np.arange(7.0)}}
    click = measure(make_test_rows(), SIGNALS, popularity)["click"]
    assert click["eligible_users"] == 2
    assert click["gauc"] is click["gauc_agent"] is click["ci95"] is None
    assert click["against"]["popularity"] == {"gauc": None, "diff": None, "diff_ci95": None}
    monkeypatch.setattr(offline, "MIN_USERS", 3)
    assert measure(make_test_rows())["click"]["gauc"] is None
    monkeypatch.setattr(offline, "MIN_USERS", 2)
    assert measure(make_test_rows())["click"]["gauc"] is not None


def test_two_hundred_users_are_needed():
    assert offline.MIN_USERS == 200

    def rows(users):
        user = np.repeat(np.arange(users), 2)
        click = np.tile([1, 0], users)
        return make_rows(user, click, click + 1.0, click)

    for users, value in ((199, None), (200, 1.0)):
        result = measure(rows(users), ("watch_time",), draws=10)
        assert result["click"]["eligible_users"] == users and result["click"]["gauc"] == value
        assert result["click"]["ci95"] == (value and [1.0, 1.0])


def test_table():
    result = {
        "click": {
            "eligible_users": 312,
            "gauc": 0.61234,
            "ci95": [0.6, 0.62],
            "gauc_agent": 0.625,
            "against": {
                "popularity": {"gauc": 0.5, "diff": 0.125, "diff_ci95": [0.1, 0.15]},
                "boosting": {"gauc": 0.7, "diff": -0.075, "diff_ci95": [-0.1, -0.05]},
            },
        },
        "watch_time_xauc": {"eligible_users": 400, "gauc": 0.5, "ci95": [0.4, 0.6]},
        "hate": {
            "eligible_users": 3,
            "gauc": None,
            "ci95": None,
            "gauc_agent": None,
            "against": {"popularity": {"gauc": None, "diff": None, "diff_ci95": None}},
        },
    }
    assert offline.format_offline(result).splitlines() == [
        "| signal | users | GAUC (served) | 95 % | GAUC (own agent) "
        "| popularity | difference | boosting | difference |",
        "|---|---|---|---|---|---|---|---|---|",
        "| click | 312 | 0.6123 | [0.6000, 0.6200] | 0.6250 "
        "| 0.5000 | [+0.1000, +0.1500] | 0.7000 | [-0.1000, -0.0500] |",
        "| watch_time_xauc | 400 | 0.5000 | [0.4000, 0.6000] | – | – | – | – | – |",
        "| hate | 3 | too few | – | – | – | – | – | – |",
    ]
    assert offline.format_offline({"hate": result["watch_time_xauc"]}).splitlines()[0].count("|") == 6  # no baseline


@pytest.mark.parametrize("train", [make_rows([], [], []), make_rows([8, 9], [0, 1], [3, 4])])
def test_empty_groups_have_no_figure(few, train):
    """No user of the test has a training row, or no one has one at all; nor has anybody two kinds of labels."""
    rows = make_test_rows()
    found = offline.metrics(
        rows, SHORT_VIDEO, SIGNALS, train, np.full(7, 30.0), {"popularity": {"watch_time": np.arange(7.0)}}
    )
    median = found["watch_time_median"]
    assert median == {
        "eligible_users": 0,
        "users_without_training_rows": 3,
        "gauc": None,
        "ci95": None,
        "by_duration": [],
        "against": {"popularity": {"gauc": None, "diff": None, "diff_ci95": None}},
    }
    assert found["watch_time_xauc"]["gauc"] is not None and found["hate"]["eligible_users"] == 0
    assert "| watch_time_median | 0 | too few | – | – | – | – |" in offline.format_offline(found)


def test_keys_of_results_by_log():
    logs = ("test", "random_test")
    results = {offline.key(name, log): (name, log) for name in ("offline", "model_quality") for log in logs}
    assert list(results) == ["offline", "offline/random_test", "model_quality", "model_quality/random_test"]
    for name in ("offline", "model_quality"):
        assert offline.by_log(results, name) == {log: (name, log) for log in logs}
    assert offline.by_log(results, "off_policy") == {}
