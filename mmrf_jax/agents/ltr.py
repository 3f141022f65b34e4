"""LTR: a supervised multi-task ranker that scores by a weighted sum of predicted signals, the paper's online control.

It learns from the production ranker's logs in every round; its heads are those of MMRF's critics.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.models import heads
from mmrf_jax.signals import Signals

AUXILIARY = 0.1  # weight of the signals of auxiliary agents; the main one has 1, the others 0


def signal_weights(signals: Signals) -> tuple[float, ...]:
    """Return the weight [S] of each signal's expectation divided by its standard deviation."""
    size = dict.fromkeys(signals.agents, AUXILIARY) | {signals.main: 1.0}
    return tuple(size.get(name, 0.0) * signals.sign(name) for name in signals.names)


def weighted_sum(config: AgentConfig, raw: chex.Array, scale: chex.Array) -> chex.Array:
    """Rank by the sum over signals of weight × expected feedback / standard deviation; a `supervised.Rank`."""
    weights = jnp.array(signal_weights(config.all_signals))
    expected = heads.expected_feedback(config.all_signals, raw, scale) / scale[:, None]
    return jnp.einsum("s,...sc->...c", weights, expected)
