"""Diversity of what was exposed: catalogue coverage, Gini index of exposures, intra-list diversity.

Pure functions of arrays, for NumPy and for JAX alike (inside `jit` too): the result is of the library of the input.
Definitions as in Castells, Hurley and Vargas, "Novelty and Diversity in Recommender Systems" (Recommender Systems
Handbook, 2nd ed., 2015).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

Array = Any  # np.ndarray or jax.Array


def coverage(counts: Array) -> Array:
    """Share of the catalogue's videos that were exposed at least once.

    Args:
      counts: [..., V] exposures of every video of the catalogue.

    Returns:
      [...] in [0, 1].
    """
    xp = _library(counts)
    return xp.mean(xp.asarray(counts) > 0, axis=-1)


def gini(counts: Array) -> Array:
    """Gini index of the exposures over the catalogue: 0 if all videos have as many, (V − 1) / V if one has all.

    Args:
      counts: [..., V] exposures (or shares of them), non-negative.

    Returns:
      [...] in [0, 1); 0 where there is no exposure at all.
    """
    xp = _library(counts)
    ordered = xp.sort(xp.asarray(counts, float), axis=-1)
    videos = ordered.shape[-1]
    total = ordered.sum(axis=-1, keepdims=True)
    share = ordered / xp.where(total > 0, total, 1)
    centred_rank = (2 * xp.arange(1, videos + 1) - videos - 1) / videos  # sums to 0, so float32 serves a large V
    return (centred_rank * share).sum(axis=-1)


def intra_list_diversity(tags: Array, mask: Array | None = None) -> Array:
    """1 − share of a slate's pairs of videos that have the same tag.

    Args:
      tags: [..., K] integer tag of each exposed video.
      mask: [..., K] bool, False where there is no exposure; all True if left out.

    Returns:
      [...] in [0, 1]; 0 for slates of fewer than two videos, which have no pair: leave them out of means.

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
