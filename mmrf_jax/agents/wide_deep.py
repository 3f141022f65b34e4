"""Wide & Deep (Cheng et al., 2016): a wide linear part over crosses, and a deep one; videos are scored separately.

One output per signal; videos are ranked by the main signal. The encoders are those of MMRF.
"""

from __future__ import annotations

import functools

import chex
import jax.numpy as jnp
from flax import linen as nn

from mmrf_jax.agents import supervised
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.models import heads

_HIDDEN = (64, 32)


def crosses(memory_mean: chex.Array, items: chex.Array) -> chex.Array:
    """Read a user's memory [..., L, F, D] at videos [..., M, D]: [..., M, L F], the feedback on similar videos."""
    reads = memory_mean.reshape(*memory_mean.shape[:-3], -1, memory_mean.shape[-1])
    return jnp.einsum("...fd,...md->...mf", reads, items)


class Deep(nn.Module):
    """Hidden layers over user state, video and crosses, separately for each video, with S outputs."""

    num_signals: int

    @nn.compact
    def __call__(self, z: chex.Array, crossed: chex.Array, items: chex.Array) -> chex.Array:
        """Map z [..., Z], crossed [..., M, X] and items [..., M, D] to [..., M, S]."""
        # A dense layer over [z; x; e], with z's part computed once per request.
        x = nn.Dense(_HIDDEN[0], use_bias=False)(z)[..., None, :]
        x = nn.gelu(x + nn.Dense(_HIDDEN[0])(jnp.concatenate([crossed, items], axis=-1)))
        for width in _HIDDEN[1:]:
            x = nn.gelu(nn.Dense(width)(x))
        return nn.Dense(self.num_signals, kernel_init=nn.initializers.zeros, use_bias=False)(x)


def prediction(prior: chex.Array, raw: chex.Array) -> heads.Prediction:
    """Build a `heads.Prediction` from priors [S, 1] and outputs [..., M, S]; staying is not predicted."""
    feedback = prior + jnp.moveaxis(raw, -1, -2)
    nothing = jnp.zeros_like(feedback[..., 0, :])
    return heads.Prediction(feedback, feedback[..., :0, :], nothing[..., 0], nothing)


class Heads(nn.Module):
    """The sum of wide and deep parts."""

    num_signals: int

    @nn.compact
    def __call__(self, z: chex.Array, memory_mean: chex.Array, items: chex.Array) -> heads.Prediction:
        """Predict from z [..., Z], memory_mean [..., L, F, D] and items [..., M, D]."""
        num_signals, zeros = self.num_signals, nn.initializers.zeros
        prior = self.param("prior", zeros, (num_signals, 1))  # set to the base rates of the first log
        crossed = crosses(memory_mean, items)

        def linear(name):
            return nn.Dense(num_signals, use_bias=False, kernel_init=zeros, name=name)

        wide = linear("wide_user")(z)[..., None, :]
        wide = wide + linear("wide_video")(jnp.concatenate([crossed, items], axis=-1))
        return prediction(prior, wide + Deep(num_signals, name="deep")(z, crossed, items))


def critic(config: AgentConfig) -> nn.Module:
    """Build the prediction network."""
    return supervised.Predictor(config, functools.partial(Heads, len(config.all_signals)))
