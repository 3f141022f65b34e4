"""Wide & Deep (Cheng et al., 2016): a wide linear part over crosses, and a deep one, each video scored on its own.

One output a signal; videos are ranked by the watch time that is expected. The same encoders as MMRF.
"""

from __future__ import annotations

import functools

import chex
import jax.numpy as jnp
from flax import linen as nn

from mmrf_jax import types
from mmrf_jax.agents import supervised
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.models import heads

_HIDDEN = (64, 32)


def crosses(memory_mean: chex.Array, items: chex.Array) -> chex.Array:
    """What a user's memory [..., L, F, D] says of videos [..., M, D]: [..., M, L F], feedback on videos like each."""
    reads = memory_mean.reshape(*memory_mean.shape[:-3], -1, memory_mean.shape[-1])
    return jnp.einsum("...fd,...md->...mf", reads, items)


class Deep(nn.Module):
    """Hidden layers over user state, video and crosses, each video alone, to S outputs."""

    @nn.compact
    def __call__(self, z: chex.Array, crossed: chex.Array, items: chex.Array) -> chex.Array:
        """z [..., Z], crossed [..., M, X], items [..., M, D] -> [..., M, S]."""
        # A dense layer over [z; x; e] with z's part made once a request.
        x = nn.Dense(_HIDDEN[0], use_bias=False)(z)[..., None, :]
        x = nn.gelu(x + nn.Dense(_HIDDEN[0])(jnp.concatenate([crossed, items], axis=-1)))
        for width in _HIDDEN[1:]:
            x = nn.gelu(nn.Dense(width)(x))
        return nn.Dense(len(types.SIGNALS), kernel_init=nn.initializers.zeros, use_bias=False)(x)


def prediction(prior: chex.Array, raw: chex.Array) -> heads.Prediction:
    """`heads.Prediction` of priors [S, 1] and outputs [..., M, S]; nothing is said of staying."""
    feedback = prior + jnp.moveaxis(raw, -1, -2)
    nothing = jnp.zeros_like(feedback[..., 0, :])
    return heads.Prediction(feedback, feedback[..., :0, :], nothing[..., 0], nothing)


class Heads(nn.Module):
    """Wide and deep parts, added."""

    @nn.compact
    def __call__(self, z: chex.Array, memory_mean: chex.Array, items: chex.Array) -> heads.Prediction:
        """z [..., Z], memory_mean [..., L, F, D], items [..., M, D]."""
        num_signals, zeros = len(types.SIGNALS), nn.initializers.zeros
        prior = self.param("prior", zeros, (num_signals, 1))  # set to the base rates of the first log
        crossed = crosses(memory_mean, items)

        def linear(name):
            return nn.Dense(num_signals, use_bias=False, kernel_init=zeros, name=name)

        wide = linear("wide_user")(z)[..., None, :]
        wide = wide + linear("wide_video")(jnp.concatenate([crossed, items], axis=-1))
        return prediction(prior, wide + Deep(name="deep")(z, crossed, items))


def critic(config: AgentConfig) -> nn.Module:
    """What predicts."""
    return supervised.Predictor(config, Heads)


update = functools.partial(supervised.update, critic=critic)
make = functools.partial(supervised.make, critic=critic, rank=supervised.by_watch_time)
