"""Items that arrive after the export: what is said of one becomes the encoder's input.

An item has {"id", "features", "author", "tag", "duration"}. Its id has no embedding yet, so it is encoded from its
features, author and tag, with the row of unknown ids; the next training gives it a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmrf_jax.data import named_features
from mmrf_jax.serving import artifact


class Undescribed(ValueError):
    """An item that cannot be encoded; `field` is what is wrong."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field, self.message = field, message


class Describer:
    """Turns what is said of items into arrays for an artefact's `encode`."""

    def __init__(self, loaded: artifact.Artifact):
        catalogue, self._spec = loaded.arrays["catalogue"], loaded.spec
        self._names = (loaded.manifest.get("names") or {}).get("item")
        self._num_statistics = loaded.manifest.get("num_statistics", 0)
        self._static = self._spec.item_features - self._num_statistics
        self._statistics = catalogue["features"][:, self._static :]
        self._author, self._tag = catalogue["author"], catalogue["tag"]
        self._vocabularies = loaded.arrays.get("vocabularies") or {}
        self._never = self._of_no_exposure()
        #: An item of which nothing is known.
        self.unknown = self.describe({"id": 0})

    def describe(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Return {"author", "tag", "embedding_id": int32, "features": [Di], "duration": s}.

        Features are {name: value} where the artefact knows names, or [Di] numbers, with or without the running means at
        their end; left out, those are of a video that was never shown. Authors and tags are the platform's ids if the
        artefact has them, else numbers of rows; one that is not of the training is unknown, row 0.

        Raises:
          Undescribed: for features that do not fit.
        """
        author = self._row("author", item.get("author"), self._spec.num_authors)
        tag = self._row("tag", item.get("tag"), self._spec.num_tags)
        features = self._features(item.get("features"))
        if len(features) == self._static:
            features = np.concatenate([features, self._priors(author, tag)])
        return {
            "author": np.int32(author),
            "tag": np.int32(tag),
            "embedding_id": np.int32(0),
            "features": features.astype(np.float32),
            "duration": np.float32(item.get("duration") or 0.0),
        }

    def _row(self, name: str, given: int | str | None, size: int) -> int:
        if name in self._vocabularies:
            return named_features.row_of(self._vocabularies[name], given)
        return given if isinstance(given, int) and 0 <= given < size else 0

    def _features(self, given: Any) -> np.ndarray:
        if given is None:
            return np.zeros(self._static, np.float32)
        if isinstance(given, Mapping):
            if self._names is None:
                raise Undescribed("features", f"the artefact knows no names of features; give {self._static} numbers")
            try:
                return named_features.encode_named(self._names, given)
            except ValueError as error:
                raise Undescribed("features", str(error)) from error
        if len(given) not in (self._static, self._spec.item_features):
            message = f"features has {len(given)} numbers, the artefact's items have {self._static}"
            raise Undescribed("features", message)
        return np.asarray(given, np.float32)

    def _of_no_exposure(self) -> np.ndarray:
        """Return the running means [F] of a video never shown, whose author and tag were not either."""
        width = self._num_statistics // 3  # of the video, of its author, of its tag; the last one counts exposures
        never = np.zeros(self._num_statistics, np.float32)
        if width:
            never[width - 1 :: width] = self._statistics[:, width - 1 :: width].min(axis=0)
        return never

    def _priors(self, author: int, tag: int) -> np.ndarray:
        """Return the running means [F] of a new video: those of its author and tag are known from their videos."""
        priors, width = self._never.copy(), self._num_statistics // 3
        for place, (column, value) in enumerate(((self._author, author), (self._tag, tag)), 1):
            of_it = np.flatnonzero(column == value)
            if width and len(of_it):
                part = slice(place * width, (place + 1) * width)
                priors[part] = self._statistics[of_it[0], part]
        return priors
