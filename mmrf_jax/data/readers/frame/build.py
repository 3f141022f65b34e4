"""What the sessions of some users need of any table: candidates, propensities, profiles and context."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import polars as pl

from mmrf_jax.data import sessions
from mmrf_jax.data.readers.engine import build
from mmrf_jax.data.readers.engine.candidates import CandidatePool
from mmrf_jax.data.readers.frame import columns, datetimes, features, sampling
from mmrf_jax.data.readers.frame.notes import Notes
from mmrf_jax.schema import Schema

#: Features of a request in addition to the columns of the context: hour (sine, cosine), absence, and position.
CONTEXT = 4


@dataclasses.dataclass
class FrameLookup:
    """What the sessions of some users need of a table (`build.Lookup`).

    Attributes:
      rows: of the users.
      num_candidates: C.
      pool: items by the day from which they are candidates.
      frame: the rows' columns.
      propensity: [n] float64; None if the log has none.
      lists: item rows of the candidate lists of all rows, see `Lists`; None if the log has none.
      profiles: [U, Du] float32 of all users.
      encoders: of the columns of the context.
      schema: with units.
      notes: takes counts.
    """

    rows: build.ShownRows
    num_candidates: int
    pool: CandidatePool
    frame: pl.DataFrame
    propensity: np.ndarray | None
    lists: Lists | None
    profiles: np.ndarray
    encoders: Sequence[features.ColumnEncoder]
    schema: Schema
    notes: Notes

    def candidates(self, requests: build.Requests) -> tuple[np.ndarray, np.ndarray]:
        """Return the logged candidates, or sampled ones."""
        sampled = build.sample_candidates(self.rows, self.pool, requests, self.num_candidates)
        if self.lists is None:
            return sampled
        flat, lengths = self.lists.of(requests.row)
        sampling.note_lengths(lengths, self.num_candidates, self.notes)
        self._check_lists(flat, lengths, requests)
        return sampling.listed_candidates(flat, lengths, requests.exposed, sampled[0], self.rows.key[requests.row])

    def _check_lists(self, flat: np.ndarray, lengths: np.ndarray, requests: build.Requests) -> None:
        """Raise ValueError for a list without a shown item."""
        exposed = requests.exposed
        size = int(max(flat.max(initial=0), exposed.max(initial=0))) + 1
        request = np.repeat(np.arange(len(lengths)), lengths)
        has = np.isin(np.arange(len(exposed))[:, None] * size + exposed, request * size + flat.astype(np.int64))
        lacking = (exposed >= 0) & ~has & (lengths > 0)[:, None]
        if lacking.any():
            row = self.frame.row(int(requests.shown[lacking][0]), named=True)
            raise ValueError(
                f"column {self.schema.candidates!r} lacks the shown item {row['item']!s} of the request in row "
                f"{row[columns.ROW]} ({int(lacking.any(axis=1).sum()):,} such requests); candidates are all items that "
                "could be shown, with those that were (without schema.request, requests are reconstructed)"
            )

    def propensities(self, requests: build.Requests, slate: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the logged propensities of slates, and scores that give them."""
        if self.propensity is None:
            return build.unlogged_propensities(requests, self.num_candidates)
        each = np.where(requests.mask, self.propensity[requests.shown], 1.0)
        return np.log(each).sum(axis=1).astype(np.float32), sampling.plackett_luce_scores(
            each, slate, self.num_candidates
        )

    def profile(self, row: np.ndarray) -> np.ndarray:
        """Return the features of users."""
        return self.profiles[self.rows.user[row]]

    def context(self, row: np.ndarray, away: np.ndarray) -> np.ndarray:
        """Return sine and cosine of the hour, the absence, and the columns of the context."""
        angle = datetimes.hours_of(self.rows.time[row], self.schema.time_zone) * (2 * np.pi / 24)
        parts = [np.stack([np.sin(angle), np.cos(angle)], axis=1), away]
        for encoder in self.encoders:
            column = self.frame[f"c{self.schema.context.index(encoder.name)}"]
            parts.append(encoder.encode(features.prepared(column.gather(row))))
        return np.concatenate(parts, axis=1)


@dataclasses.dataclass
class Lists:
    """Candidate lists of rows: item rows, one list after another.

    Attributes:
      item: [sum of lengths] int32.
      offsets: [n + 1] where the list of each row begins.
    """

    item: np.ndarray
    offsets: np.ndarray

    def of(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the item rows of some lists [m], one after another, and their lengths [m]."""
        lengths = self.offsets[which + 1] - self.offsets[which]
        return self.item[sessions.ragged_arange(self.offsets[which], lengths)], lengths
