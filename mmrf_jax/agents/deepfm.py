"""DeepFM (Guo et al., 2017): a factorisation machine and a deep part over the same fields, one output per signal.

Fields are the user state, the crosses of the user's memory with the video, and the video's encoding in two parts: the
id's row and the rest. Videos are ranked by the main signal. The encoders are those of MMRF.
"""

from __future__ import annotations

import functools

import chex
import jax.numpy as jnp
from flax import linen as nn

from mmrf_jax.agents import supervised
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.agents.wide_deep import Deep, crosses, prediction
from mmrf_jax.models import heads

_FACTORS = 16


def pairs(fields: chex.Array) -> chex.Array:
    """Sum elementwise products over pairs of fields [..., F, k], to [..., k]: ((Σ v)² − Σ v²) / 2."""
    return 0.5 * (fields.sum(axis=-2) ** 2 - (fields**2).sum(axis=-2))


class Heads(nn.Module):
    """The sum of first-order, second-order and deep parts.

    Attributes:
      id_dim: width of the id's row within an encoding, where it follows a constant.
      num_signals: S.
    """

    id_dim: int
    num_signals: int

    @nn.compact
    def __call__(self, z: chex.Array, memory_mean: chex.Array, items: chex.Array) -> heads.Prediction:
        """Predict from z [..., Z], memory_mean [..., L, F, D] and items [..., M, D]."""
        num_signals, zeros = self.num_signals, nn.initializers.zeros
        prior = self.param("prior", zeros, (num_signals, 1))  # set to the base rates of the first log
        crossed = crosses(memory_mean, items)
        row, rest = items[..., 1 : 1 + self.id_dim], items[..., 1 + self.id_dim :]

        def factors(name, x):
            return nn.Dense(_FACTORS, name=name)(x)

        user = jnp.broadcast_to(factors("user", z)[..., None, :], (*items.shape[:-1], _FACTORS))
        fields = jnp.stack([user, factors("memory", crossed), factors("id", row), factors("video", rest)], axis=-2)

        def linear(name):
            return nn.Dense(num_signals, use_bias=False, kernel_init=zeros, name=name)

        raw = linear("first_user")(z)[..., None, :]
        raw = raw + linear("first_video")(jnp.concatenate([crossed, items], axis=-1)) + linear("second")(pairs(fields))
        return prediction(prior, raw + Deep(num_signals, name="deep")(z, crossed, items))


def critic(config: AgentConfig) -> nn.Module:
    """Build the prediction network."""
    return supervised.Predictor(config, functools.partial(Heads, config.id_dim, len(config.all_signals)))
