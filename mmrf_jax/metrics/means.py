"""Means over what a mask keeps, inside jit."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Axis = int | Sequence[int] | None


def masked_sum(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """Sum of `x` where `mask`; what is masked out may be NaN or infinite, and gets a gradient of 0.

    Args:
      x: [...].
      mask: bool, broadcastable to x.
      axis: axes to sum over; all by default.
    """
    return jnp.sum(jnp.where(mask, x, 0), axis=axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """Mean of `x` where `mask`, and 0 where the mask keeps nothing.

    Args:
      x: [...].
      mask: bool, broadcastable to x.
      axis: axes to average over; all by default.
    """
    count = jnp.sum(jnp.broadcast_to(mask, jnp.shape(x)), axis=axis)
    return masked_sum(x, mask, axis) / jnp.maximum(count, 1)


def weighted_sums(values: jax.Array, weights: jax.Array, axis: Axis = None) -> tuple[jax.Array, jax.Array]:
    """Numerator and denominator of a weighted mean, which add up over batches, steps and devices.

    Args:
      values: [...]; ignored where the weight is 0, NaN included.
      weights: broadcastable to values, at least 0; a bool mask will do.
      axis: axes to sum over; all by default.

    Returns:
      The sum of weights × values and the sum of weights; `ratio` of the two is the mean.
    """
    weights = jnp.broadcast_to(jnp.asarray(weights, jnp.result_type(float)), jnp.shape(values))
    return masked_sum(weights * jnp.where(weights > 0, values, 0), weights > 0, axis), jnp.sum(weights, axis=axis)


def ratio(total: jax.Array, weight: jax.Array) -> jax.Array:
    """total / weight, and 0 where the weight is 0."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)
