"""The rows of some users as sessions: requests, candidates, histories and context, some sessions at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from mmrf_jax.data import sessions
from mmrf_jax.data.readers.engine.candidates import Pool
from mmrf_jax.data.readers.engine.grouping import HOUR_MS, MAX_HOURS, MINUTE_MS
from mmrf_jax.data.readers.frame import columns, features, sampling
from mmrf_jax.data.readers.frame.columns import Notes
from mmrf_jax.data.readers.frame.requests import Rows
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.schema import Schema

#: Features of a request in addition to the columns of the context: hour (sine, cosine), absence, and position.
CONTEXT = 4


@dataclasses.dataclass
class Bucket:
    """All rows of some users, and what their sessions need of the whole log.

    Attributes:
      rows: the rows.
      lists: item rows of the candidate lists of all rows, see `Lists`; None if the log has none.
      profiles: [U, Du] float32 of all users.
      context: encoders of the columns of the context.
      pool: items by the day from which they are candidates.
      last: the last time (ms) of each part of the log; 0 for an empty one.
      candidates: C.
      slate: K.
      schema: with units.
      notes: takes counts.
    """

    rows: Rows
    lists: Lists | None
    profiles: np.ndarray
    context: Sequence[features.Encoder]
    pool: Pool
    last: Sequence[int]
    candidates: int
    slate: int
    schema: Schema
    notes: Notes

    def __post_init__(self):
        rows = self.rows
        first = np.flatnonzero(rows.request_start)
        self.num_requests = len(first)
        self._first = np.append(first, len(rows))  # row of each request
        self._start = np.flatnonzero(rows.session_start[first])  # request of each session
        self._lengths = np.diff(np.append(self._start, len(first)))
        begin = np.append(True, rows.user[1:] != rows.user[:-1])
        self._earliest = np.flatnonzero(begin)[np.cumsum(begin) - 1]  # first row of each row's user

    @functools.cached_property
    def split(self) -> np.ndarray:
        """The split [n] int8 of each session."""
        return self.rows.split[self._first[self._start]]

    def gather(self, which: np.ndarray) -> Sessions:
        """Return the sessions at positions [m], in that order."""
        rows, lengths, start = self.rows, self._lengths[which], self._start[which]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        request = sessions.ragged_arange(start, lengths)
        first, end = self._first[request], self._first[request + 1]
        exposure = first[:, None] + np.arange(self.slate)
        shown = exposure < end[:, None]
        exposure = np.where(shown, exposure, first[:, None])
        exposed = np.where(shown, rows.item[exposure], -1).astype(np.int32)
        day = columns.days(rows.time[first], self.schema.time_zone)
        candidates, chosen = self._candidates(first, exposed, day)
        log_propensity, scores = np.full(len(first), np.nan, np.float32), None
        if rows.propensity is not None:
            each = np.where(shown, rows.propensity[exposure], 1.0)
            log_propensity = np.log(each).sum(axis=1).astype(np.float32)
            scores = sampling.scores_of(each, chosen, self.candidates)
        begin = self._first[start]
        terminated = self._terminated(start, lengths)
        return Sessions(
            user_id=rows.user[begin],
            date=day[offsets[:-1]],
            profile=self.profiles[rows.user[begin]],
            **self._history(begin),
            terminated=terminated,
            truncated=~terminated,
            offsets=offsets,
            context=self._context(first, request - np.repeat(start, lengths)),
            candidates=candidates,
            slate=chosen,
            feedback=np.where(shown[..., None], rows.feedback[exposure], 0.0).astype(np.float32),
            log_propensity=log_propensity,
            scores=scores,
        )

    def _candidates(self, first: np.ndarray, exposed: np.ndarray, day: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return candidates [r, C] and slates [r, K] of the requests that start at rows `first` [r]."""
        key = sampling.keys(exposed, self.rows.user[first], self.rows.time[first])
        sampled = self.pool.sample(key, day, exposed, self.candidates)
        if self.lists is None:
            return sampled
        flat, lengths = self.lists.of(first)
        sampling.note_lengths(lengths, self.candidates, self.notes)
        self._check_lists(flat, lengths, exposed, first)
        return sampling.listed(flat, lengths, exposed, sampled[0], key)

    def _check_lists(self, flat: np.ndarray, lengths: np.ndarray, exposed: np.ndarray, first: np.ndarray) -> None:
        """Raise ValueError for a list without a shown item."""
        size = int(max(flat.max(initial=0), exposed.max(initial=0))) + 1
        request = np.repeat(np.arange(len(lengths)), lengths)
        has = np.isin(np.arange(len(exposed))[:, None] * size + exposed, request * size + flat.astype(np.int64))
        lacking = (exposed >= 0) & ~has & (lengths > 0)[:, None]
        if lacking.any():
            at, slot = (int(x[0]) for x in np.nonzero(lacking))
            row = self.rows.frame.row(int(first[at]) + slot, named=True)
            raise ValueError(
                f"column {self.schema.candidates!r} lacks the shown item {row['item']!s} of the request in row "
                f"{row[columns.ROW]} ({int(lacking.any(axis=1).sum()):,} such requests); candidates are all items that "
                "could be shown, with those that were (without schema.request, requests are reconstructed)"
            )

    def _history(self, begin: np.ndarray) -> dict[str, np.ndarray]:
        """Return the history fields before the rows `begin` [m] of sessions."""
        index = begin[:, None] + np.arange(-self.schema.history, 0)
        mask = index >= self._earliest[begin][:, None]
        index = np.where(mask, index, 0)
        return {
            "history_videos": np.where(mask, self.rows.item[index], 0).astype(np.int32),
            "history_feedback": np.where(mask[..., None], self.rows.feedback[index], 0.0).astype(np.float32),
            "history_mask": mask,
        }

    def _terminated(self, start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return whether each session [m] ended: the user came back later, or its part goes on for longer than the gap.

        Only rows of the session's own part of the log decide, so training does not depend on later days.
        """
        rows, last = self.rows, self._first[start + lengths] - 1  # last row of each session
        after = np.minimum(last + 1, len(rows) - 1)
        returns = (last < after) & (rows.user[last] == rows.user[after]) & (rows.split[last] == rows.split[after])
        ended = rows.frame["ended"].to_numpy()[last]
        return returns | (np.array(self.last)[rows.split[last]] - ended > self.schema.session_gap * MINUTE_MS)

    def _context(self, first: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Return features [r, Dx] of requests.

        Sine and cosine of the hour, hours since the user's last item, the columns of the context, log1p(position).
        """
        rows = self.rows
        time, before = rows.time[first], np.maximum(first - 1, 0)
        known = first > self._earliest[first]
        hours = np.where(known, np.clip((time - rows.time[before]) / HOUR_MS, 0.0, MAX_HOURS), MAX_HOURS)
        angle = columns.hours(time, self.schema.time_zone) * (2 * np.pi / 24)
        away = np.log1p(hours) / np.log1p(MAX_HOURS)
        parts = [np.stack([np.sin(angle), np.cos(angle), away], axis=1)]
        for encoder in self.context:
            column = rows.frame[f"c{self.schema.context.index(encoder.name)}"]
            parts.append(encoder.encode(features.prepared(column.gather(first))))
        return np.concatenate([*parts, np.log1p(position)[:, None]], axis=1).astype(np.float32)


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
