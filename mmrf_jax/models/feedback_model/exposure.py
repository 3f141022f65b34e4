"""A model of what the logging ranker shows, fitted with the feedback model, and inverse propensity weights by it.

Each slot of a slate is a choice among the candidates that the slots above it left (Plackett–Luce). A loss that is
weighted by the inverse of these propensities estimates the loss on candidates chosen at random (Schnabel et al., 2016;
as a head of the same network: ESCM2, Wang et al., 2022), if the choice depends on nothing but what the model sees.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from mmrf_jax import ops, types
from mmrf_jax.models import heads, products

MAX_WEIGHT = 10.0  # relative to the weight of a slot that was filled at random


class ExposureHead(nn.Module):
    """Scores of videos by which the logging ranker chooses; `dtype` is of the operands of products."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, z: chex.Array, memory_mean: chex.Array, items: chex.Array) -> chex.Array:
        """Map user states [..., Z], means of memories [..., L, F, D] and items [..., M, D] to scores [..., M]."""
        hidden = nn.gelu(products.dense(32, self.dtype, name="hidden")(z))
        user = heads.UserVectors(1, self.dtype, name="user")(jnp.concatenate([z, hidden], axis=-1), memory_mean)
        own = products.dense(1, self.dtype, name="item")(
            nn.gelu(products.dense(32, self.dtype, name="item_hidden")(items))
        )
        return products.einsum("...nd,...md->...nm", user, items, self.dtype)[..., 0, :] + own[..., 0]


def log_propensities(scores: chex.Array, batch: types.SessionBatch) -> tuple[chex.Array, chex.Array]:
    """Compute the log-propensity of each slot, given the slots above it, and its log-ratio to a random choice.

    Args:
      scores: [..., B, T, C] of the candidates.
      batch: of T requests; its `weight` says how many candidates each one represents.

    Returns:
      Both [..., B, T, K], 0 where nothing was shown.
    """
    chex.assert_equal_shape_suffix([scores, batch.candidates], 3)
    many = jnp.ones(batch.candidates.shape) if batch.weight is None else jnp.asarray(batch.weight)
    mask = jnp.asarray(batch.slate_mask)
    left = many.sum(axis=-1, keepdims=True) - jnp.cumsum(mask, axis=-1) + mask
    shape = scores.shape[:-1]
    slate, shown = (jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in (batch.slate, mask))
    each = ops.plackett_luce_log_prob(scores + jnp.broadcast_to(jnp.log(many), scores.shape), slate, shown)
    return each, jnp.where(shown, each + jnp.broadcast_to(jnp.log(left), each.shape), 0.0)


def weights(log_ratio: chex.Array, at_random: chex.Array | None = None) -> chex.Array:
    """Return weights of exposures: the inverse of their propensity relative to a random choice, at most `MAX_WEIGHT`.

    Args:
      log_ratio: [..., T, K] of `log_propensities`.
      at_random: [..., T] bool, requests whose slate was random, all of weight 1; None for none.
    """
    weight = jnp.minimum(jnp.exp(-jax.lax.stop_gradient(log_ratio)), MAX_WEIGHT)
    return weight if at_random is None else jnp.where(at_random[..., None], 1.0, weight)


def loss(log_propensity: chex.Array, exposed: chex.Array) -> chex.Array:
    """Return the mean −log-propensity [...] of exposures.

    Args:
      log_propensity: [..., B, T, K] of `log_propensities`.
      exposed: [B, T, K] 1 for the exposures that the ranker chose, else 0.
    """
    return -jnp.einsum("btk,...btk->...", exposed, log_propensity) / jnp.maximum(exposed.sum(), 1.0)
