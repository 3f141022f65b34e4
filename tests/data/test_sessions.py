"""Choosing and joining sessions, and segments compared with a slow reference that loops over everything."""

import dataclasses

import chex
import numpy as np
import pytest

from mmrf_jax.data import sessions
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.metrics import ranking
from mmrf_jax.signals import SHORT_VIDEO


def reference_segments(log: Sessions, t: int) -> list[dict]:
    """Segments with Python lists, one exposure at a time."""
    k, h = log.slate.shape[1], log.history_videos.shape[1]
    segments = []
    for n in range(log.num_sessions):
        first, end = int(log.offsets[n]), int(log.offsets[n + 1])
        seen = [(v, f) for v, f, m in zip(log.history_videos[n], log.history_feedback[n], log.history_mask[n]) if m]  # noqa: B905
        for start in range(first, end, t):
            history = seen[-h:]
            requests = []
            for row in range(start, start + t + 1):
                if row >= end:
                    requests.append(None)
                    continue
                shown = [(int(p), log.feedback[row, i]) for i, p in enumerate(log.slate[row]) if p >= 0]
                requests.append({"row": row, "shown": shown, "last": row == end - 1})
                if row < start + t:
                    seen = seen + [(log.candidates[row, p], f) for p, f in shown]
            segments.append({"session": n, "start": start, "history": history, "requests": requests})
            assert len(requests) == t + 1 and k >= max(len(r["shown"]) for r in requests if r)
    return segments


@pytest.mark.parametrize("t", [1, 2, 3, 4, 9, 12])
def test_segments_equal_the_reference(make_log, t):
    log = make_log(t, 60)
    index = sessions.segment_index(log, t)
    expected = reference_segments(log, t)
    assert [[s["session"], s["start"]] for s in expected] == index.tolist()
    order = np.random.default_rng(0).permutation(len(index))  # rows may come in any order
    batch = sessions.gather_segments(log, index[order], t)
    chex.assert_shape(batch.slate, (len(index), t + 1, log.slate.shape[1]))
    assert batch.num_requests == t
    h = log.history_videos.shape[1]
    for b, i in enumerate(order):
        segment = expected[i]
        n = segment["session"]
        assert batch.user_id[b] == log.user_id[n]
        np.testing.assert_array_equal(batch.profile[b], log.profile[n])
        kept = len(segment["history"])
        assert batch.history.mask[b].tolist() == [False] * (h - kept) + [True] * kept
        assert batch.history.videos[b].tolist() == [0] * (h - kept) + [int(v) for v, _ in segment["history"]]
        for slot, (_, feedback) in enumerate(segment["history"], h - kept):
            np.testing.assert_array_equal(batch.history.feedback[b, slot], feedback)
        for j, request in enumerate(segment["requests"]):
            assert batch.mask[b, j] == (request is not None)
            if request is None:
                assert not batch.slate_mask[b, j].any() and np.isnan(batch.log_propensity[b, j])
                assert not batch.terminated[b, j] and not batch.truncated[b, j]
                assert not batch.feedback[b, j].any() and not batch.candidates[b, j].any()
                continue
            row, shown = request["row"], request["shown"]
            np.testing.assert_array_equal(batch.candidates[b, j], log.candidates[row])
            np.testing.assert_array_equal(batch.context[b, j], log.context[row])
            np.testing.assert_array_equal(batch.log_propensity[b, j], log.log_propensity[row])
            assert batch.slate[b, j][batch.slate_mask[b, j]].tolist() == [p for p, _ in shown]
            assert batch.slate[b, j].min() >= 0
            np.testing.assert_array_equal(batch.feedback[b, j][batch.slate_mask[b, j]], np.stack([f for _, f in shown]))
            assert batch.terminated[b, j] == (request["last"] and log.terminated[n])
            assert batch.truncated[b, j] == (request["last"] and log.truncated[n])


def test_every_request_is_trained_on_once_and_exact_sessions_are_one_segment(make_log):
    log, t = make_log(5, 100, longest=8), 4
    index = sessions.segment_index(log, t)
    batch = sessions.gather_segments(log, index, t)
    assert batch.mask[:, :t].sum() == log.num_requests
    assert batch.terminated[:, :t].sum() == log.terminated.sum()
    exact = np.flatnonzero(np.diff(log.offsets) == t)
    assert len(exact) and all((index[:, 0] == n).sum() == 1 for n in exact)
    assert not batch.mask[np.isin(index[:, 0], exact), t].any()


def test_a_batch_is_a_pytree_of_the_documented_types(make_log):
    log = make_log(6, 8)
    batch = sessions.gather_segments(log, sessions.segment_index(log, 3), 3)
    for name in ("mask", "slate_mask", "terminated", "truncated"):
        assert getattr(batch, name).dtype == bool
    assert batch.candidates.dtype == np.int32 and batch.slate.dtype == np.int32
    assert batch.feedback.dtype == np.float32 and batch.feedback.shape[-1] == len(SHORT_VIDEO)
    assert batch.log_propensity.dtype == np.float32


def test_gathering_does_not_change_the_log(make_log):
    log = make_log(7, 30)
    before = dataclasses.replace(log, **{f.name: getattr(log, f.name).copy() for f in dataclasses.fields(log)})
    sessions.gather_segments(log, sessions.segment_index(log, 2), 2)
    for field in dataclasses.fields(log):
        np.testing.assert_array_equal(getattr(log, field.name), getattr(before, field.name))


def test_select_and_concatenate(make_log):
    log = make_log(8, 40)
    which = np.array([7, 3, 3, 39, 0])
    some = sessions.select_sessions(log, which)
    for i, n in enumerate(which):
        np.testing.assert_array_equal(
            some.candidates[some.offsets[i] : some.offsets[i + 1]], log.candidates[log.offsets[n] : log.offsets[n + 1]]
        )
        assert some.user_id[i] == log.user_id[n]
    mask = log.user_id % 2 == 0
    parts = [sessions.select_sessions(log, mask), sessions.select_sessions(log, ~mask)]
    joined = sessions.concatenate(parts)
    back = sessions.select_sessions(joined, np.argsort(np.concatenate([np.flatnonzero(mask), np.flatnonzero(~mask)])))
    for field in dataclasses.fields(log):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(log, field.name), err_msg=field.name)
    none = sessions.select_sessions(log, np.zeros(40, bool))
    assert none.num_sessions == 0 and none.num_requests == 0 and none.offsets.tolist() == [0]
    assert len(sessions.segment_index(none, 3)) == 0


def test_errors(make_log):
    log = make_log(9, 4)
    with pytest.raises(ValueError, match="use at least 1"):
        sessions.segment_index(log, 0)
    with pytest.raises(ValueError, match="4 sessions"):
        sessions.select_sessions(log, np.ones(3, bool))
    with pytest.raises(ValueError, match="1 of 2 logs hold scores"):
        sessions.concatenate([log, make_log(9, 4, scores=False)])
    with pytest.raises(ValueError, match="at least one"):
        sessions.concatenate([])


def test_mean_return_equals_a_loop_over_sessions(make_log):
    log = make_log(sessions=40, seed=3)
    returns = []
    for n in range(log.num_sessions):
        later = np.zeros(len(SHORT_VIDEO))
        for r in reversed(range(log.offsets[n], log.offsets[n + 1])):
            later = log.feedback[r][log.slate[r] >= 0].sum(axis=0, dtype=np.float64) + 0.9 * later
            returns.append(later)
    np.testing.assert_allclose(sessions.mean_return(log, 0.9), np.mean(returns, axis=0), rtol=1e-12)


def test_frozen_histories_hold_nothing_of_the_log_itself(make_log):
    log = make_log(4, 40)
    log = dataclasses.replace(log, user_id=log.user_id % 15)  # users come more than once
    frozen = sessions.freeze_histories(log)
    assert frozen.num_sessions == frozen.num_requests == log.num_requests
    np.testing.assert_array_equal(frozen.feedback, log.feedback)
    for n in range(log.num_sessions):
        first = int(np.flatnonzero(log.user_id == log.user_id[n])[0])
        for r in range(log.offsets[n], log.offsets[n + 1]):
            assert frozen.user_id[r] == log.user_id[n] and frozen.date[r] == log.date[n]
            np.testing.assert_array_equal(frozen.profile[r], log.profile[n])
            for name in ("history_videos", "history_feedback", "history_mask"):
                np.testing.assert_array_equal(getattr(frozen, name)[r], getattr(log, name)[first])
    batch = sessions.gather_segments(frozen, sessions.segment_index(frozen, 1), 1)
    noise = dataclasses.replace(frozen, feedback=frozen.feedback + 1.0)
    again = sessions.gather_segments(noise, sessions.segment_index(noise, 1), 1)
    np.testing.assert_array_equal(batch.history.feedback, again.history.feedback)


def test_a_score_that_follows_feedback_is_judged_by_arithmetic_alone():
    """Clicks by the toss of a coin, two a user: minus what was clicked before ranks perfectly, knowing nothing."""
    clicks = np.random.default_rng(0).integers(0, 2, (500, 2))
    users = np.repeat(np.arange(500), 2)
    before = np.stack([np.zeros(500), 2 * clicks[:, 0] - 1], axis=1)

    def ranked(scores):
        return ranking.grouped_auc(users, scores.reshape(-1), {"click": clicks.reshape(-1)})["click"].value

    assert ranked(before) == 0.0 and ranked(-before) == 1.0
