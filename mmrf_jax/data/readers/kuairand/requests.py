"""Conversion of log rows to sessions of requests, with each user's history before the session.

KuaiRand has neither session nor request ids. A session ends when the user is away for longer than the session gap. A
request is a **reconstruction**: consecutive exposures of a session, of the same tab, at most `request_gap_minutes`
apart, up to K of them and all different. The actual ranking requests are unknown.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl

from mmrf_jax.data.readers.kuairand import columns
from mmrf_jax.signals import SHORT_VIDEO

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
UTC_OFFSET_MS = 8 * HOUR_MS  # Kuaishou's days are in Beijing time
NUM_TABS = 15
MAX_HOURS = 168.0
CONTEXT = 2 + NUM_TABS + 1 + 2


@dataclasses.dataclass
class Rows:
    """Log rows as arrays [n], sorted by user and time."""

    user: np.ndarray  # int32
    item: np.ndarray  # int32 item rows
    date: np.ndarray  # int32
    time: np.ndarray  # int64, milliseconds
    tab: np.ndarray  # int16
    flags: np.ndarray  # [n, S − 1] int8
    play: np.ndarray  # int32, milliseconds

    @classmethod
    def from_frame(cls, frame: pl.DataFrame, item: np.ndarray) -> Rows:
        names = ("user_id", "date", "time_ms", "tab", "play_time_ms")
        user, date, time, tab, play = (frame[name].to_numpy() for name in names)
        flags = frame.select(columns.SIGNAL_COLUMNS).to_numpy()
        return cls(user, item, date, time, tab, flags, play)

    def __len__(self) -> int:
        return len(self.user)

    def take(self, which: np.ndarray) -> Rows:
        """Select rows by `which` [n] bool."""
        return self if which.all() else Rows(**{f.name: getattr(self, f.name)[which] for f in dataclasses.fields(self)})

    def feedback(self, which: np.ndarray) -> np.ndarray:
        """Return the feedback of rows [...]: [..., S] float32, in the order of `signals.SHORT_VIDEO`."""
        out = np.empty((*which.shape, len(SHORT_VIDEO)), np.float32)
        out[..., :-1] = self.flags[which]
        out[..., -1] = self.play[which] / 1000
        return out


def session_starts(user: np.ndarray, time: np.ndarray, gap_minutes: float) -> np.ndarray:
    """Return [n] bool, True where a session starts; rows [n] sorted by user and time (ms)."""
    start = np.ones(len(user), bool)
    start[1:] = (user[1:] != user[:-1]) | (np.diff(time) > gap_minutes * MINUTE_MS)
    return start


def request_starts(
    session_start: np.ndarray, item: np.ndarray, tab: np.ndarray, time: np.ndarray, size: int, gap_minutes: float
) -> np.ndarray:
    """Return [n] bool, True where a request of at most `size` different videos starts; every session start is one."""
    n = len(item)
    run_start = session_start.copy()
    run_start[1:] |= (tab[1:] != tab[:-1]) | (np.diff(time) > gap_minutes * MINUTE_MS)
    run = np.cumsum(run_start, dtype=np.int32)
    nearest = np.full(n, size)  # rows back to the previous exposure of the video, if near
    for step in range(size - 1, 0, -1):
        nearest[step:][item[step:] == item[: n - step]] = step
    # Where a request that starts at row i would end.
    following = np.minimum(np.arange(n) + size, n)
    for step in range(min(size, n) - 1, 0, -1):
        stops = (run[step:] != run[: n - step]) | (nearest[step:] <= step)
        following[: n - step][stops] = np.flatnonzero(stops) + step
    start = run_start.copy()
    at = np.flatnonzero(run_start)
    while len(at):  # all runs at once, one request per iteration
        at = following[at]
        at = at[at < n]
        at = at[~run_start[at]]
        start[at] = True
    return start


@dataclasses.dataclass
class Plan:
    """The sessions of one split, as rows of `rows`; candidates and histories are gathered block by block."""

    rows: Rows  # rows of the split
    past: Rows  # rows allowed in histories: standard log, days up to the split's last
    session_first: np.ndarray  # [s + 1] request where each session starts
    request_first: np.ndarray  # [r + 1] row where each request starts
    terminated: np.ndarray  # [s] bool; the others are truncated

    @property
    def num_sessions(self) -> int:
        return len(self.terminated)

    def __post_init__(self):
        times = [rows.time for rows in (self.rows, self.past) if len(rows)]
        self._origin = min((int(t.min()) for t in times), default=0)
        self._span = max((int(t.max()) for t in times), default=0) - self._origin + 1
        self._past_key = self._key(self.past.user, self.past.time)

    def _key(self, user: np.ndarray, time: np.ndarray) -> np.ndarray:
        return user.astype(np.int64) * self._span + (time - self._origin)

    def past_range(self, user: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of `past` that a user [m] had strictly before a time [m]: (first, end)."""
        key = self._key(user, np.full(len(user), self._origin, np.int64))
        return np.searchsorted(self._past_key, key), np.searchsorted(self._past_key, self._key(user, time))

    def history(self, sessions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (videos [m, H] int32, feedback [m, H, S], mask [m, H]) before the first exposure of sessions [m]."""
        row = self.request_first[self.session_first[sessions]]
        first, end = self.past_range(self.rows.user[row], self.rows.time[row])
        index = end[:, None] + np.arange(-length, 0)
        mask = index >= first[:, None]
        if not len(self.past):
            shape = (*mask.shape, len(SHORT_VIDEO))
            return np.zeros(mask.shape, np.int32), np.zeros(shape, np.float32), mask
        index = np.where(mask, index, 0)
        videos, feedback = self.past.item[index], self.past.feedback(index)
        videos[~mask], feedback[~mask] = 0, 0
        return videos, feedback, mask

    def context(self, requests: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Return features [m, CONTEXT] float32 of requests [m] at a position [m] of their session.

        Sine and cosine of the hour (UTC+8); one-hot tab 0 … 14 and other; log1p of the hours since the user's previous
        exposure, over its maximum (a week or more, or none); log1p of the position.
        """
        row = self.request_first[requests]
        user, time = self.rows.user[row], self.rows.time[row]
        first, end = self.past_range(user, time)
        before = self.past.time[np.maximum(end - 1, 0)] if len(self.past) else np.zeros(len(row), np.int64)
        hours = np.where(end > first, (time - before) / HOUR_MS, MAX_HOURS)
        angle = (time + UTC_OFFSET_MS) % (24 * HOUR_MS) / HOUR_MS * (2 * np.pi / 24)
        tab = self.rows.tab[row]
        tab = np.where((tab >= 0) & (tab < NUM_TABS), tab, NUM_TABS)
        return np.concatenate(
            [
                np.stack([np.sin(angle), np.cos(angle)], 1),
                tab[:, None] == np.arange(NUM_TABS + 1),
                (np.log1p(np.minimum(hours, MAX_HOURS)) / np.log1p(MAX_HOURS))[:, None],
                np.log1p(position)[:, None],
            ],
            axis=1,
        ).astype(np.float32)


def plan_standard(
    past: Rows, own: np.ndarray, slate: int, session_gap_minutes: float, request_gap_minutes: float, log_end: int
) -> Plan:
    """Plan sessions of the rows `own` [n] bool of `past`, some users' standard log up to the split's last day.

    A session is terminated if the split's rows show that the user stayed away for longer than the session gap: either
    the user has a later session, or the split's last row, at `log_end` (ms) of any user, is that much later. Any other
    session is truncated: the split or the log ended first. Later days are not used, so training sessions cannot depend
    on them.
    """
    rows = past.take(own)
    session_start = session_starts(rows.user, rows.time, session_gap_minutes)
    request_start = request_starts(session_start, rows.item, rows.tab, rows.time, slate, request_gap_minutes)
    first_rows, n = np.flatnonzero(request_start), len(rows)
    session_first = np.flatnonzero(session_start[first_rows])
    request_first = np.append(first_rows, n)
    session_first = np.append(session_first, len(first_rows))
    last = request_first[session_first[1:]] - 1
    returns = np.zeros(len(last), bool)
    returns[:-1] = rows.user[last[:-1]] == rows.user[np.minimum(last[:-1] + 1, max(n - 1, 0))]
    away = log_end - rows.time[last] > session_gap_minutes * MINUTE_MS
    return Plan(rows, past, session_first, request_first, terminated=returns | away)


def plan_random(rows: Rows, past: Rows) -> Plan:
    """Plan every random exposure as a session of one request of one video; truncated, as the user went on elsewhere."""
    every = np.arange(len(rows) + 1)
    return Plan(rows, past, every, every, terminated=np.zeros(len(rows), bool))
