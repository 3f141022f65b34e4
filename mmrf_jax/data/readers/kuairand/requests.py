"""Conversion of log rows to sessions of requests, with candidates and each user's history before the session.

KuaiRand has neither session nor request ids. A session ends when the user is away for longer than the session gap. A
request is a **reconstruction**: consecutive exposures of a session, of the same tab, at most `request_gap_minutes`
apart, up to K of them and all different. The actual ranking requests are unknown.

KuaiRand does not log the candidates of a request either. They are its exposed videos plus others sampled uniformly from
the pool of videos live on that day. Sampling hashes (seed, request), so it depends neither on the order nor on the
presence of other requests.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import polars as pl

from mmrf_jax.data import records
from mmrf_jax.data.readers.engine.candidates import Pool, request_keys
from mmrf_jax.data.readers.engine.grouping import HOUR_MS, MAX_HOURS, MINUTE_MS, request_starts, session_starts
from mmrf_jax.data.readers.kuairand import csv_files
from mmrf_jax.data.readers.kuairand.clean import NEVER, UTC_OFFSET_MS
from mmrf_jax.data.readers.kuairand.config import RANDOM_SPLITS
from mmrf_jax.data.readers.kuairand.features import Catalogue, Profiles
from mmrf_jax.data.readers.kuairand.job import Job
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.data.splits import SPLITS, SplitDates
from mmrf_jax.signals import SHORT_VIDEO

NUM_TABS = 15
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
        flags = frame.select(csv_files.SIGNAL_COLUMNS).to_numpy()
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


def random_rows(rows: pl.DataFrame, dates: SplitDates, split: str) -> pl.DataFrame:
    """Return the rows of the random log on the days of one of `RANDOM_SPLITS`."""
    random = rows.filter(pl.col("is_rand") == 1)
    return random.filter(dates.split_of(random["date"].to_numpy()) == SPLITS.index(RANDOM_SPLITS[split]))


@dataclasses.dataclass
class Bucket:
    """The usable rows of some users, and all data needed for their sessions.

    Attributes:
      job: the job.
      rows: usable rows, as returned by `clean.clean`.
      catalogue: all items.
      profiles: all user profiles.
      pools: candidate pool of each split.
      log_end: time (ms) of the last row of each split of the standard log, over all users.
      user_ids: [U] int64 of all users, whose positions are their numbers; None if ids are the numbers.
    """

    job: Job
    rows: pl.DataFrame
    catalogue: Catalogue
    profiles: Profiles
    pools: dict[str, Pool]
    log_end: dict[str, int]
    user_ids: np.ndarray | None = None

    @functools.cached_property
    def _standard(self) -> Rows:
        return self._read(self.rows.filter(pl.col("is_rand") == 0))

    def _read(self, frame: pl.DataFrame) -> Rows:
        return Rows.from_frame(frame, self.catalogue.rows_of(frame["video_id"].to_numpy()))

    def plan(self, split: str) -> Plan:
        """Plan the sessions of a split."""
        config = self.job.config
        if split in RANDOM_SPLITS:
            return plan_random(self._read(random_rows(self.rows, config.dates, split)), self._standard)
        last = {"train": config.train_until, "valid": config.valid_until}.get(split, NEVER)
        past = self._standard.take(self._standard.date <= last)
        own = config.dates.split_of(past.date) == SPLITS.index(split)
        return plan_standard(
            past, own, config.slate, self.job.session_gap_minutes, config.request_gap_minutes, self.log_end[split]
        )

    def blocks(self, split: str, plan: Plan) -> Iterator[Sessions]:
        """Yield the sessions of a split, `records.SESSIONS_PER_RECORD` at a time; one empty block if there are none."""
        step, total = records.SESSIONS_PER_RECORD, plan.num_sessions
        for start in range(0, max(total, 1), step):
            yield self.gather(split, plan, np.arange(start, min(start + step, total)))

    def gather(self, split: str, plan: Plan, sessions: np.ndarray) -> Sessions:
        """Build the log of consecutive sessions."""
        config = self.job.config
        first = int(plan.session_first[sessions[0]]) if len(sessions) else 0
        end = int(plan.session_first[sessions[-1] + 1]) if len(sessions) else 0
        offsets = np.append(plan.session_first[sessions], end) - first
        request = np.arange(first, end)
        row, after = plan.request_first[request], plan.request_first[request + 1]
        exposure = row[:, None] + np.arange(config.slate)
        shown = exposure < after[:, None]
        exposure = np.where(shown, exposure, row[:, None])
        exposed = np.where(shown, plan.rows.item[exposure], -1)
        feedback = plan.rows.feedback(exposure)
        feedback[~shown] = 0
        day = plan.rows.date[row]
        key = request_keys(
            config.seed, plan.rows.user[row], plan.rows.time[row], self.catalogue.video_id[plan.rows.item[row]]
        )
        drawn, slate = self.pools[split].sample(key, day, exposed, config.candidates)
        videos, history_feedback, mask = plan.history(sessions, config.history)
        start = plan.request_first[plan.session_first[sessions]]
        user = plan.rows.user[start]
        number = user if self.user_ids is None else np.searchsorted(self.user_ids, user).astype(np.int32)
        terminated = plan.terminated[sessions]
        known = -np.log(config.candidates) if split in RANDOM_SPLITS else np.nan
        return Sessions(
            user_id=number,
            date=plan.rows.date[start],
            profile=self.profiles.of(user),
            history_videos=videos,
            history_feedback=history_feedback,
            history_mask=mask,
            terminated=terminated,
            truncated=~terminated,
            offsets=offsets.astype(np.int64),
            context=plan.context(request, request - np.repeat(plan.session_first[sessions], np.diff(offsets))),
            candidates=drawn,
            slate=slate,
            feedback=feedback,
            log_propensity=np.full(len(request), known, np.float32),
            scores=None,
        )


def counts(plan: Plan) -> dict[str, int]:
    """Count users, sessions, requests, exposures and terminated sessions of a plan."""
    return {
        "users": int((np.diff(plan.rows.user) != 0).sum()) + (len(plan.rows) > 0),
        "sessions": plan.num_sessions,
        "requests": len(plan.request_first) - 1,
        "exposures": len(plan.rows),
        "terminated": int(plan.terminated.sum()),
    }
