"""Diversity of exposures: item coverage, Gini index of exposures, intra-list diversity.

Pure functions for both NumPy and JAX arrays (also inside `jit`): the result has the array type of the input.
Definitions as in Castells, Hurley and Vargas, "Novelty and Diversity in Recommender Systems" (Recommender Systems
Handbook, 2nd ed., 2015).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

Array = Any  # np.ndarray or jax.Array


def coverage(counts: Array) -> Array:
    """Return the share of all videos that were exposed at least once.

    Args:
      counts: [..., V] exposures of every video in the item set.

    Returns:
      [...] in [0, 1].
    """
    xp = _library(counts)
    return xp.mean(xp.asarray(counts) > 0, axis=-1)


def gini(counts: Array) -> Array:
    """Return the Gini index of exposures over all videos: 0 if all are equal, (V − 1) / V if one video has all.

    Args:
      counts: [..., V] exposures (or shares of them), non-negative.

    Returns:
      [...] in [0, 1); 0 if there are no exposures.
    """
    xp = _library(counts)
    ordered = xp.sort(xp.asarray(counts, float), axis=-1)
    videos = ordered.shape[-1]
    total = ordered.sum(axis=-1, keepdims=True)
    share = ordered / xp.where(total > 0, total, 1)
    centred_rank = (2 * xp.arange(1, videos + 1) - videos - 1) / videos  # sums to 0, so float32 suffices for large V
    return (centred_rank * share).sum(axis=-1)


def intra_list_diversity(tags: Array, mask: Array | None = None) -> Array:
    """Return 1 − the share of a slate's pairs of videos with the same tag.

    Args:
      tags: [..., K] integer tag of each exposed video.
      mask: [..., K] bool, False where there is no exposure; all True by default.

    Returns:
      [...] in [0, 1]; 0 for slates of fewer than two videos, which have no pairs: leave them out of means.

    Raises:
      ValueError: for a mask of another shape.
    """
    xp = _library(tags)
    tags = xp.asarray(tags)
    mask = xp.ones(tags.shape, bool) if mask is None else xp.asarray(mask)
    if mask.shape != tags.shape:
        raise ValueError(f"mask {mask.shape} and tags {tags.shape} must have the same shape [..., K]")
    first, second = np.triu_indices(tags.shape[-1], k=1)
    pair = mask[..., first] & mask[..., second]
    pairs = pair.sum(axis=-1)
    different = (pair & (tags[..., first] != tags[..., second])).sum(axis=-1)
    return different / xp.where(pairs > 0, pairs, 1)


def _library(array: Array) -> Any:
    jax = sys.modules.get("jax")  # an array of JAX has imported it
    return jax.numpy if jax is not None and isinstance(array, jax.Array) else np
