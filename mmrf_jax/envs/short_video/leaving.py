"""When users of the world leave, and when they come back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import random, types
from mmrf_jax.envs.short_video import parameters

if TYPE_CHECKING:
    from mmrf_jax.envs.short_video import env


def next_visit(key: types.Key, state: env.WorldState, params: parameters.WorldParams) -> chex.Array:
    """Sample the days [B] until the next visit: one after an enjoyed session, up to 30 after a dull one."""
    b = params.behaviour
    u = random.per_user_uniform(jax.random.fold_in(key, 3), state.day, state.user_id, 1)[:, 0]
    enjoyment = state.total_enjoyment / jnp.maximum(state.position, 1).astype(jnp.float32)
    daily = jax.nn.sigmoid(
        b.return_logit + b.return_enjoyment * (enjoyment - b.enjoyment_centre) + 0.3 * state.traits.patience
    )
    days = 1.0 + jnp.floor(jnp.log(u) / jnp.log1p(-daily))
    return jnp.clip(days, 1, 30).astype(jnp.int32)


def continue_logit(params: parameters.WorldParams, state: env.WorldState, enjoyment: chex.Array) -> chex.Array:
    """Compute the log-odds [B] of another request after a slate with these enjoyments [B, K]."""
    b = params.behaviour
    return (
        b.continue_logit
        + b.continue_enjoyment * (enjoyment.mean(axis=1) - b.enjoyment_centre)
        + b.continue_patience * state.traits.patience
        - b.continue_fatigue * state.position.astype(jnp.float32)
    )
