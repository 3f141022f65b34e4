"""Items that were described to a ranking service: they join the item set of the next training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmrf_jax import types
from mmrf_jax.data import named_features
from mmrf_jax.data.readers import feedback_log, feedback_sessions


def with_new(
    items: types.Items,
    ids: np.ndarray,
    folder: str | os.PathLike,
    encoders: named_features.Encoders,
    vocabularies: Mapping[str, np.ndarray],
) -> tuple[types.Items, np.ndarray]:
    """Return the items and their ids with those of a feedback log that are new, each with its own embedding row.

    Args:
      items: the items, NumPy arrays [V, ...] without statistics.
      ids: [V] the platform's ids.
      folder: the feedback log.
      encoders: of the items' features by name.
      vocabularies: {"author", "tag": the platform's ids of their rows}; a missing one has row numbers for ids.

    Raises:
      ValueError: for an item whose features do not fit, naming it.
    """
    described = feedback_sessions.new_items(folder)
    rows = feedback_log.rows_by_id(ids)(feedback_log.ids_of([item["id"] for item in described]))
    new = [item for item, row in zip(described, rows, strict=True) if row < 0]
    if not new:
        return items, ids
    width = np.shape(items.features)[1]

    def rows_of(name: str, size: int) -> np.ndarray:
        given = [item.get(name) for item in new]
        if name in vocabularies:
            return np.array([named_features.row_of(vocabularies[name], value) for value in given], np.int32)
        return np.array([number if number is not None and number < size else 0 for number in given], np.int32)

    more = {
        "author": rows_of("author", items.num_authors),
        "tag": rows_of("tag", items.num_tags),
        "duration": np.array([item.get("duration") or 0.0 for item in new], np.float32),
        "features": np.stack([_features(item, encoders, width) for item in new]),
        "embedding_id": items.num_embeddings + np.arange(len(new), dtype=np.int32),
    }
    joined: dict[str, Any] = {name: np.concatenate([np.asarray(getattr(items, name)), x]) for name, x in more.items()}
    made = dataclasses.replace(items, **joined, num_embeddings=items.num_embeddings + len(new))
    found = feedback_log.ids_of([item["id"] for item in new])
    return made, np.concatenate([ids, found if ids.dtype.kind == "U" else found.astype(ids.dtype)])


def _features(item: Mapping[str, Any], encoders: named_features.Encoders, width: int) -> np.ndarray:
    """Return the features [D] of an item without running means, which the training computes."""
    given = item.get("features")
    if given is None:
        return np.zeros(width, np.float32)
    if isinstance(given, Mapping):
        try:
            given = named_features.encode_named(encoders, given)
        except ValueError as error:
            raise ValueError(f"item {item['id']!r} of the feedback log: {error}") from error
    if len(given) < width:
        raise ValueError(
            f"item {item['id']!r} of the feedback log has {len(given)} features, and items have {width}; use the "
            "config of the run that was served"
        )
    return np.asarray(given, np.float32)[:width]
