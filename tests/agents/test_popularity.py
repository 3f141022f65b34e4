"""Smoothed means by hand."""

import numpy as np
import pytest

from mmrf_jax import types
from mmrf_jax.agents import popularity
from mmrf_jax.envs import rankers
from mmrf_jax.signals import SHORT_VIDEO

CLICK, LIKE = SHORT_VIDEO.index("click"), SHORT_VIDEO.index("like")


def make_feedback():
    """Four exposures: three of video 2 (clicked, clicked and liked, neither), one of video 0 (clicked)."""
    feedback = np.zeros((4, len(SHORT_VIDEO)), np.float32)
    feedback[[0, 1, 3], CLICK] = 1
    feedback[1, LIKE] = 1
    feedback[:, SHORT_VIDEO.index("watch_time")] = np.expm1([1.0, 2.0, 6.0, 3.0])
    return np.array([2, 2, 2, 0], np.int32), feedback


def test_smoothed_means_by_hand():
    means = popularity.smoothed_means(SHORT_VIDEO, *make_feedback(), num_videos=4)
    assert means.shape == (4, len(SHORT_VIDEO)) and means.dtype == np.float64
    # 20 exposures of the overall mean and a video's own: clicks 3 of 4, likes 1 of 4, log1p of seconds 12 / 4.
    np.testing.assert_allclose(means[:, CLICK], [(1 + 15) / 21, 0.75, (2 + 15) / 23, 0.75])
    np.testing.assert_allclose(means[:, LIKE], [5 / 21, 0.25, (1 + 5) / 23, 0.25])
    np.testing.assert_allclose(
        means[:, SHORT_VIDEO.index("watch_time")], [(3 + 60) / 21, 3.0, (9 + 60) / 23, 3.0], rtol=1e-6
    )
    others = np.delete(means, [CLICK, LIKE, SHORT_VIDEO.index("watch_time")], axis=1)
    np.testing.assert_array_equal(others, 0.0)


def test_the_prior_fades_with_exposures(monkeypatch):
    videos, feedback = make_feedback()
    many = popularity.smoothed_means(SHORT_VIDEO, np.tile(videos, 10_000), np.tile(feedback, (10_000, 1)), 4)
    np.testing.assert_allclose(many[[0, 2], CLICK], [1, 2 / 3], atol=1e-3)
    monkeypatch.setattr(popularity, "PRIOR", 1e9)
    np.testing.assert_allclose(popularity.smoothed_means(SHORT_VIDEO, videos, feedback, 4)[:, CLICK], 0.75, atol=1e-6)


def test_watch_time_is_not_decided_by_a_long_play():
    """Ten plays of a minute are worth more than nine of a second and one of an hour."""
    feedback = np.zeros((20, len(SHORT_VIDEO)), np.float32)
    feedback[:, SHORT_VIDEO.index("watch_time")] = [60.0] * 10 + [1.0] * 9 + [3600.0]
    means = popularity.smoothed_means(SHORT_VIDEO, np.repeat([0, 1], 10), feedback, 2)[
        :, SHORT_VIDEO.index("watch_time")
    ]
    assert means[0] > means[1]
    assert means.mean() == pytest.approx(np.log1p(feedback[:, SHORT_VIDEO.index("watch_time")]).mean(), rel=1e-6)


def test_as_an_arm_it_ranks_by_mean_watch_time():
    means = popularity.smoothed_means(SHORT_VIDEO, *make_feedback(), num_videos=4)
    policy = popularity.make_popularity_ranker(SHORT_VIDEO, means)
    request = types.Request(user_id=None, profile=None, context=None, candidates=np.array([[3, 2, 0], [0, 1, 2]]))
    scores = np.asarray(policy.score(policy.params, policy.start(policy.params, request, None), request))
    np.testing.assert_allclose(scores, means[[[3, 2, 0], [0, 1, 2]], SHORT_VIDEO.index("watch_time")], rtol=1e-6)
    assert policy.temperature == 0.0 and not isinstance(policy, rankers.PrivilegedPolicy)
