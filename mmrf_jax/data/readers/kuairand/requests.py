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
import pathlib
from collections.abc import Iterator

import numpy as np
import polars as pl

from mmrf_jax.data import records
from mmrf_jax.data.readers.kuairand import csv_files
from mmrf_jax.data.readers.kuairand.backend import Job
from mmrf_jax.data.readers.kuairand.clean import NEVER, UTC_OFFSET_MS, order_of
from mmrf_jax.data.readers.kuairand.config import RANDOM_SPLITS
from mmrf_jax.data.readers.kuairand.features import Catalogue, Profiles
from mmrf_jax.data.session_log import SessionLog
from mmrf_jax.data.splits import SPLITS, SplitDates
from mmrf_jax.signals import SHORT_VIDEO

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
NUM_TABS = 15
MAX_HOURS = 168.0
CONTEXT = 2 + NUM_TABS + 1 + 2

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_AT_ONCE = 256  # requests whose random draws fit in a core's cache


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


def mix(x: np.ndarray) -> np.ndarray:
    """Apply the SplitMix64 finaliser: uint64 to uint64, every output bit depends on every input bit."""
    y = x >> np.uint64(30)
    y ^= x
    y *= np.uint64(0xBF58476D1CE4E5B9)
    y ^= y >> np.uint64(27)
    y *= np.uint64(0x94D049BB133111EB)
    y ^= y >> np.uint64(31)
    return y


def request_keys(seed: int, *parts: np.ndarray) -> np.ndarray:
    """Return keys [R] uint64 of requests, from the seed and integers [R] that identify a request."""
    key: np.ndarray = np.full(len(parts[0]), seed, np.uint64)
    for part in parts:
        key = mix(key + _GOLDEN) ^ part.astype(np.uint64)
    return mix(key + _GOLDEN)


def _draw(key: np.ndarray, count: int, size: np.ndarray) -> np.ndarray:
    """Return the first numbers [R, count] of the streams of keys [R], uniform in [0, size); `size` is uint64."""
    bits = mix(key[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    bits >>= np.uint64(32)
    bits *= size
    bits >>= np.uint64(32)
    return bits.view(np.int64)


class Pool:
    """The videos that are live on each day: those whose first day is not after that day."""

    def __init__(self, videos: np.ndarray, days: np.ndarray):
        """Store the pool; see `make_pool`.

        Args:
          videos: [P] int32 item rows, in the order of their first days.
          days: [P] int32 first days.
        """
        self._order, self._days = videos, days

    @property
    def size(self) -> int:
        return len(self._order)

    def save(self, path: pathlib.Path) -> None:
        """Write the pool to files whose names begin with `path`; see `read_pool`."""
        np.save(f"{path}-videos.npy", self._order)
        np.save(f"{path}-days.npy", self._days)

    def live(self, dates: np.ndarray) -> np.ndarray:
        """Return the number [R] int64 of videos live on dates [R]."""
        return np.searchsorted(self._days, dates, side="right")

    def check(self, date: int, candidates: int, slate: int) -> None:
        """Raise ValueError if fewer than `candidates` videos are live on a date; later dates have at least as many."""
        live = int(self.live(np.array(date)))
        if live == 0:
            raise ValueError(
                f"no video is live on {date}, the first day of a split: none was uploaded or shown before; add video "
                "features or earlier days of the log"
            )
        if live < candidates:
            fields = "candidates" if live >= slate else "slate and candidates"
            raise ValueError(
                f"{live} videos are live on {date}, {candidates} candidates are asked for; "
                f"set {fields} to at most {live}"
            )

    def sample(
        self, key: np.ndarray, dates: np.ndarray, exposed: np.ndarray, candidates: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sample the candidates of R requests.

        Args:
          key: [R] uint64, `request_keys`.
          dates: [R] the day of each request; `check` must accept them.
          exposed: [R, K] int32 item rows, different within a request; −1 at its end where fewer were shown.
          candidates: C.

        Returns:
          Candidates [R, C] int32, all different, the exposed ones at random positions; and slate [R, K] int32, the
          positions of the exposed ones in the given order, −1 where there is none.
        """
        found = np.empty((len(key), candidates), np.int32)
        size = self.live(dates).astype(np.uint64)
        for start in range(0, len(key), _AT_ONCE):
            at = slice(start, start + _AT_ONCE)
            self._different(key[at], size[at], exposed[at], found[at])
        return found, _place(key, found, exposed)

    def _different(self, key: np.ndarray, size: np.ndarray, exposed: np.ndarray, found: np.ndarray) -> None:
        """Fill `found` [R, C] with the exposed videos, then with the first draws of each key, without duplicates."""
        (_, k), c = exposed.shape, found.shape[1]
        shown = (exposed >= 0).sum(1).astype(np.uint64)
        shifted = key - shown * _GOLDEN  # so that the first draw comes after the exposed
        np.take(self._order, _draw(shifted, c, size[:, None]), out=found, mode="clip")
        found[:, :k] = np.where(exposed >= 0, exposed, found[:, :k])
        ranked = np.sort(found, axis=1)
        todo, count = np.flatnonzero((ranked[:, 1:] == ranked[:, :-1]).any(1)), c + c // 4 + 16
        absent = -1 - np.arange(k)  # different from each other, so that none counts as a duplicate
        while len(todo):  # rows with a duplicate need more draws
            others = self._order[_draw(key[todo], count, size[todo, None])]
            drawn = np.concatenate([np.where(exposed[todo] >= 0, exposed[todo], absent), others], axis=1)
            order = np.argsort(drawn, axis=1, kind="stable")
            ranked = np.take_along_axis(drawn, order, 1)
            repeated = np.zeros(drawn.shape, bool)
            np.put_along_axis(repeated, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], 1)
            fresh = ~repeated & (drawn >= 0)
            rank = np.cumsum(fresh, axis=1)
            enough = rank[:, -1] >= c
            fresh &= (rank <= c) & enough[:, None]
            found[todo[enough]] = drawn[fresh].reshape(-1, c)
            todo, count = todo[~enough], count * 2


def make_pool(live_from: np.ndarray, never: int) -> Pool:
    """Return the pool of item rows [V] by the day from which each is live, int32; rows with `never` are left out."""
    order = order_of(live_from)
    days = live_from[order]
    size = int(np.searchsorted(days, never))
    return Pool(order[:size].astype(np.int32), days[:size])


def read_pool(path: pathlib.Path) -> Pool:
    """Read a pool written by `Pool.save`, as read-only memory maps."""
    return Pool(np.load(f"{path}-videos.npy", mmap_mode="r"), np.load(f"{path}-days.npy", mmap_mode="r"))


def _place(key: np.ndarray, found: np.ndarray, exposed: np.ndarray) -> np.ndarray:
    """Move the exposed videos, the first of each row of `found`, to random positions by K Fisher–Yates steps.

    Returns:
      The positions of the exposed videos [R, K] int32, −1 where there is none.
    """
    (r, c), k = found.shape, exposed.shape[1]
    step = np.arange(k)
    other = step + _draw(mix(key ^ _GOLDEN), k, (c - step).astype(np.uint64))
    first = np.arange(r) * c
    place = np.tile(np.arange(c, dtype=np.int32), r)
    for i in range(k):
        here, there = first + i, first + other[:, i]
        place[here], place[there] = place[there], place[here]
    # A video that no step has moved is already in place.
    moved = first[:, None] + np.concatenate([np.broadcast_to(step, (r, k)), other], axis=1)
    flat = found.reshape(-1)
    flat[first[:, None] + place[moved]] = flat[moved]
    return np.where(exposed >= 0, place.reshape(r, c)[:, :k], -1)


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

    def blocks(self, split: str, plan: Plan) -> Iterator[SessionLog]:
        """Yield the sessions of a split, `records.SESSIONS_PER_RECORD` at a time; one empty block if there are none."""
        step, total = records.SESSIONS_PER_RECORD, plan.num_sessions
        for start in range(0, max(total, 1), step):
            yield self.gather(split, plan, np.arange(start, min(start + step, total)))

    def gather(self, split: str, plan: Plan, sessions: np.ndarray) -> SessionLog:
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
        return SessionLog(
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
