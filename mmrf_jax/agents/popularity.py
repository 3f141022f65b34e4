"""The popularity ranker: the smoothed mean of each signal per video on the training days, the same for all users."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from mmrf_jax import types
from mmrf_jax.data import statistics
from mmrf_jax.envs import rankers
from mmrf_jax.signals import Signals

PRIOR = 20.0  # pseudo-exposures of the overall mean


def smoothed_means(signals: Signals, videos: np.ndarray, feedback: np.ndarray, num_videos: int) -> np.ndarray:
    """Compute per-video means of training feedback, shrunk to the overall mean.

    Args:
      signals: of the log.
      videos: [n] int32.
      feedback: [n, S]; durations and counts enter as log1p, so that a few long plays do not decide a video's rank.
      num_videos: V.

    Returns:
      [V, S] float64.
    """
    values = feedback.copy()
    values[:, signals.amounts] = np.log1p(feedback[:, signals.amounts])
    values = values.astype(np.float64)
    return statistics.shrunken_means(videos, values, num_videos, PRIOR)[:, :-1]


def make_popularity_ranker(signals: Signals, means: np.ndarray) -> rankers.Ranker:
    """Return a policy that ranks all candidates by the means [V, S] of their main signal, as an arm of A/B tests."""
    main = signals.sign(signals.main) * means[:, signals.index(signals.main)]
    return rankers.Ranker(jnp.asarray(main, jnp.float32), rankers.nothing, _score, rankers.nothing)


def _score(mean, memory, request: types.Request):
    del memory
    return mean[request.candidates]
