"""LTR: a supervised multi-task ranker that scores by a weighted sum of predicted signals, the paper's online control.

It learns from the production ranker's logs in every round; its heads are those of MMRF's critics.
"""

from __future__ import annotations

import functools

import chex
import jax.numpy as jnp

from mmrf_jax import types
from mmrf_jax.agents import supervised
from mmrf_jax.agents.mmrf import networks
from mmrf_jax.models import heads

#: Weights of each signal's expectation divided by its standard deviation.
WEIGHTS = {
    "click": 0.1,
    "like": 0.1,
    "follow": 0.1,
    "comment": 0.1,
    "forward": 0.1,
    "hate": -0.1,
    "watch_time": 1.0,
}


def weighted_sum(raw: chex.Array, scale: chex.Array) -> chex.Array:
    """Rank by the sum over signals of weight × expected feedback / standard deviation; a `supervised.Rank`."""
    weights = jnp.array([WEIGHTS.get(s, 0.0) for s in types.SIGNALS])
    expected = heads.expected_feedback(raw, scale) / scale[:, None]
    return jnp.einsum("s,...sc->...c", weights, expected)


update = functools.partial(supervised.update, critic=networks.Critic)
make = functools.partial(supervised.make, critic=networks.Critic, rank=weighted_sum)
