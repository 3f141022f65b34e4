"""What a report shows of a trained state: cosines by hand, and the candidates that are worth a look."""

import numpy as np
import pytest

from mmrf_jax import types
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import run_report


def test_cosines_by_hand():
    # Three batches of two agents: sums (3, 0) and (3, 3); halves (2, 0), (1, 0) and (2, 1), (1, 2).
    gradients = np.array([[[1, 0], [1, 0]], [[1, 0], [1, 2]], [[1, 0], [1, 1]]], float)
    found = run_report.agreement(gradients)
    root = np.sqrt(0.5)
    np.testing.assert_allclose(found["matrix"], [[1, root], [root, 1]])
    np.testing.assert_allclose(found["itself"], [1, 4 / 5])
    assert run_report.agreement(gradients[:1])["itself"] is None
    np.testing.assert_array_equal(run_report.agreement(0 * gradients)["matrix"], np.zeros((2, 2)))


def make_log(user_id, lengths) -> Sessions:
    n, r = len(lengths), sum(lengths)
    empty = np.zeros((n, 0))
    return Sessions(
        np.array(user_id),
        np.zeros(n, int),
        empty,
        empty,
        empty,
        empty,
        np.ones(n, bool),
        np.zeros(n, bool),
        np.cumsum([0, *lengths]),
        np.zeros((r, 1)),
        np.zeros((r, 3)),
        np.zeros((r, 1)),
        np.zeros((r, 1, 9)),
        np.zeros(r),
        None,
    )


def test_the_longest_session_of_each_user_is_looked_at():
    log = make_log([5, 5, 6, 7, 8], [1, 4, 2, 3, 1])
    assert run_report._longest(log, 3).tolist() == [1, 2, 3]
    assert run_report._longest(log, 9).tolist() == [1, 2, 3, 4]


def test_a_request_lists_what_was_shown_then_what_agents_rank_high():
    candidates, k, n = 20, 2, 2
    scores = np.zeros((1, 1, n, candidates))
    scores[0, 0, 1] = -np.arange(candidates)  # the main agent: 0, 1, 2, …
    scores[0, 0, 0, 17] = 5.0  # the other agent's first
    feedback = np.zeros((1, 1, k, len(SHORT_VIDEO)), np.float32)
    feedback[0, 0, 0, [SHORT_VIDEO.index("like"), SHORT_VIDEO.index("watch_time")]] = 1.0, 12.34
    batch = types.SessionBatch(
        user_id=np.zeros(1),
        date=np.zeros(1, np.int32),
        profile=None,
        history=None,
        context=None,
        candidates=100 + np.arange(candidates).reshape(1, 1, -1),
        slate=np.array([[[12, 3]]]),
        slate_mask=np.array([[[True, False]]]),
        feedback=feedback,
        log_propensity=None,
        mask=np.ones((1, 1), bool),
        terminated=None,
        truncated=None,
    )
    rows = run_report._request(SHORT_VIDEO, batch, scores, np.full(200, 30.0), 0, 0)
    # Shown is 12; then the main agent's nine best, then 17. The slot that is not there shows nothing.
    assert [row["video"] - 100 for row in rows] == [12, *range(9), 17]
    assert rows[0] == {
        "video": 112,
        "duration": 30.0,
        "slot": 0,
        "scores": [0.0, -12.0],
        "ranks": [14, 13],
        "signals": ["like"],
        "seconds": pytest.approx(12.3, abs=0.01),
    }
    assert rows[-1]["ranks"] == [1, 18] and rows[-1]["slot"] is None and "seconds" not in rows[-1]
