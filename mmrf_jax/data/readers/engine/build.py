"""The rows of some users as sessions of one part of a log: requests, histories and context, some sessions at a time."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from mmrf_jax.data import sessions
from mmrf_jax.data.readers.engine.candidates import CandidatePool
from mmrf_jax.data.readers.engine.grouping import HOUR_MS, MAX_HOURS, MINUTE_MS, request_starts, session_starts
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.data.splits import RANDOM, SPLITS


@dataclasses.dataclass
class ShownRows:
    """Shown items [n] of some users, sorted by user and time.

    Attributes:
      user: int32 number of the user.
      item: int32 row of the item table.
      time: int64, ms.
      day: int32, such as 20240502.
      feedback: [n, S] float32.
      key: uint64; the candidates of a request are drawn by the key of its first row.
      ended: int64, ms: the last time of the row's request, if that is known; otherwise its time.
      run: int64; rows of a request have the same.
      random: bool, shown at random: such rows are parts of their own, and in no history.
      requested: whether `run` are requests as they were; otherwise requests are reconstructed within runs.
      strict: whether only rows of earlier times are history of a row; otherwise all rows before it.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    day: np.ndarray
    feedback: np.ndarray
    key: np.ndarray
    ended: np.ndarray
    run: np.ndarray
    random: np.ndarray
    requested: bool = False
    strict: bool = False

    def __post_init__(self):
        new_user = np.append(True, self.user[1:] != self.user[:-1])[: len(self)]
        self.begin = _first_of_run(new_user)  # [n] the first row of the user
        self.since = np.arange(len(self))  # [n] the rows before it are earlier
        if self.strict:
            self.since = _first_of_run(new_user | np.append(True, self.time[1:] != self.time[:-1])[: len(self)])

    def __len__(self) -> int:
        return len(self.user)


def _first_of_run(starts: np.ndarray) -> np.ndarray:
    """Return for each row the first row of its run; `starts` [n] is True where a run starts."""
    return np.flatnonzero(starts)[np.cumsum(starts) - 1]


@dataclasses.dataclass
class SessionPlan:
    """The sessions of one part of the log; their rows, candidates and histories are gathered later.

    Attributes:
      part: its name.
      own: [n] rows of the part, ascending.
      past: [p] rows that may be in histories, ascending.
      request_first: [r + 1] position in `own` where each request starts.
      session_first: [s + 1] request where each session starts.
      past_first, past_end: [r] the positions in `past` of what the user saw before each request.
      terminated: [s] bool; the others are truncated.
    """

    part: str
    own: np.ndarray
    past: np.ndarray
    request_first: np.ndarray
    session_first: np.ndarray
    past_first: np.ndarray
    past_end: np.ndarray
    terminated: np.ndarray

    @property
    def num_sessions(self) -> int:
        """The number of sessions."""
        return len(self.terminated)


@dataclasses.dataclass(frozen=True)
class SessionSizes:
    """How rows become sessions.

    Attributes:
      candidates, slate, history: C, K and H.
      session_gap: minutes of absence that end a session.
      request_gap: the most minutes between two rows of a reconstructed request.
    """

    candidates: int
    slate: int
    history: int
    session_gap: float
    request_gap: float


def plan_sessions(
    rows: ShownRows, part: str, split: np.ndarray, sizes: SessionSizes, log_end: int = 0, until: int | None = None
) -> SessionPlan:
    """Plan the sessions of a part.

    A session is terminated if the part's rows show that the user stayed away for longer than the gap: the user has a
    later session, or the part goes on for longer. Any other session is truncated. Later parts are not used, so sessions
    of training cannot depend on them. A row that was shown at random is a session of one request, which is truncated.

    Args:
      rows: all rows of some users.
      part: one of `PARTS`.
      split: [n] int8 position in `SPLITS` of each row, −1 for none.
      sizes: how rows become sessions.
      log_end: time (ms) of the last row of the part, of any user.
      until: last day of histories; None for any.
    """
    at_random = part in RANDOM
    own = np.flatnonzero((split == SPLITS.index(RANDOM.get(part, part))) & (rows.random == at_random))
    past = np.flatnonzero(~rows.random if until is None else ~rows.random & (rows.day <= until))
    session = request = np.ones(len(own), bool)
    if not at_random:
        time, run = rows.time[own], rows.run[own]
        session = session_starts(rows.user[own], time, sizes.session_gap, rows.ended[own])
        if rows.requested:
            request = np.append(True, run[1:] != run[:-1])[: len(own)]
        else:
            request = request_starts(session, rows.item[own], run, time, sizes.slate, sizes.request_gap)
    first = np.flatnonzero(request)
    session_first = np.append(np.flatnonzero(session[first]), len(first))
    request_first = np.append(first, len(own))
    terminated = np.zeros(len(session_first) - 1, bool)
    if not at_random:
        begin, last = own[request_first[session_first[:-1]]], own[request_first[session_first[1:]] - 1]
        terminated = log_end - rows.ended[last] > sizes.session_gap * MINUTE_MS
        terminated[:-1] |= rows.user[last[:-1]] == rows.user[begin[1:]]
    past_first, past_end = (np.searchsorted(past, edge[own[first]]) for edge in (rows.begin, rows.since))
    return SessionPlan(part, own, past, request_first, session_first, past_first, past_end, terminated)


class Requests(NamedTuple):
    """Some requests, to find their candidates.

    Attributes:
      plan: of their part.
      row: [r] first row.
      shown: [r, K] rows; the first one where fewer were shown.
      mask: [r, K] bool, where something was shown.
      exposed: [r, K] int32 item rows, −1 where fewer were shown.
    """

    plan: SessionPlan
    row: np.ndarray
    shown: np.ndarray
    mask: np.ndarray
    exposed: np.ndarray


class Lookup(Protocol):
    """What the sessions of some users need of the whole log."""

    def candidates(self, requests: Requests) -> tuple[np.ndarray, np.ndarray]:
        """Return candidates [r, C] int32 of requests, and the positions [r, K] int32 of what was shown among them."""

    def propensities(self, requests: Requests, slate: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return log-propensities [r] float32 of the slates, NaN if unknown, and scores [r, C] or None."""

    def profile(self, row: np.ndarray) -> np.ndarray:
        """Return features [m, Du] float32 of the users of rows [m]."""

    def context(self, row: np.ndarray, away: np.ndarray) -> np.ndarray:
        """Return features [r, Dx − 1] of the requests that start at rows [r], without the position in the session.

        Args:
          row: the rows.
          away: [r, 1] log1p of the hours since the user's last item, over its maximum (a week or more, or none).
        """


def sample_candidates(
    rows: ShownRows, pool: CandidatePool, requests: Requests, candidates: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return `Lookup.candidates` where none are logged: what was shown, and others of the pool's items of the day."""
    return pool.sample(rows.key[requests.row], rows.day[requests.row], requests.exposed, candidates)


def unlogged_propensities(requests: Requests, candidates: int) -> tuple[np.ndarray, None]:
    """Return `Lookup.propensities` where none are logged: unknown, or those of slates that were drawn at random."""
    known = -np.log(candidates) if requests.plan.part in RANDOM else np.nan
    return np.full(len(requests.row), known, np.float32), None


@dataclasses.dataclass
class UserBucket:
    """All rows of some users.

    Attributes:
      rows: the rows.
      sizes: how they become sessions.
      lookup: what the sessions need of the whole log.
    """

    rows: ShownRows
    sizes: SessionSizes
    lookup: Lookup

    def gather(self, plan: SessionPlan, which: np.ndarray) -> Sessions:
        """Return the sessions [m] of a plan, in the given order."""
        rows, start = self.rows, plan.session_first[which]
        lengths = plan.session_first[which + 1] - start
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        number = sessions.ragged_arange(start, lengths)
        position = plan.request_first[number][:, None] + np.arange(self.sizes.slate)
        mask = position < plan.request_first[number + 1][:, None]
        shown = plan.own[np.where(mask, position, position[:, :1])]
        exposed = np.where(mask, rows.item[shown], -1).astype(np.int32)
        requests = Requests(plan, shown[:, 0], shown, mask, exposed)
        candidates, slate = self.lookup.candidates(requests)
        log_propensity, scores = self.lookup.propensities(requests, slate)
        feedback = rows.feedback[shown]
        feedback[~mask] = 0.0
        begin = plan.own[plan.request_first[start]]
        context = [self.lookup.context(requests.row, self._away(plan, number, requests.row))]
        context.append(np.log1p(number - np.repeat(start, lengths))[:, None])
        terminated = plan.terminated[which]
        return Sessions(
            user_id=rows.user[begin],
            date=rows.day[begin],
            profile=self.lookup.profile(begin),
            **self._history(plan, start),
            terminated=terminated,
            truncated=~terminated,
            offsets=offsets,
            context=np.concatenate(context, axis=1).astype(np.float32),
            candidates=candidates,
            slate=slate,
            feedback=feedback,
            log_propensity=log_propensity,
            scores=scores,
        )

    def _history(self, plan: SessionPlan, request: np.ndarray) -> dict[str, np.ndarray]:
        """Return the history fields of sessions that begin with requests [m]."""
        index = plan.past_end[request][:, None] + np.arange(-self.sizes.history, 0)
        mask = index >= plan.past_first[request][:, None]
        row = plan.past[np.where(mask, index, 0)] if len(plan.past) else np.zeros_like(index)
        videos, feedback = self.rows.item[row].astype(np.int32), self.rows.feedback[row]
        videos[~mask], feedback[~mask] = 0, 0.0
        return {"history_videos": videos, "history_feedback": feedback, "history_mask": mask}

    def _away(self, plan: SessionPlan, request: np.ndarray, row: np.ndarray) -> np.ndarray:
        end = plan.past_end[request]
        before = plan.past[np.maximum(end - 1, 0)] if len(plan.past) else row
        hours = (self.rows.time[row] - self.rows.time[before]) / HOUR_MS
        hours = np.where(end > plan.past_first[request], np.minimum(hours, MAX_HOURS), MAX_HOURS)
        return (np.log1p(hours) / np.log1p(MAX_HOURS))[:, None]
