"""The ranking service without HTTP: it ranks for users, logs everything, and swaps artefacts while it runs.

One event loop owns users, log and store. One thread scores; it takes as a batch all requests that arrived while it
scored the previous batch. Requests of one user wait for each other.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import math
import sqlite3
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mmrf_jax.data.readers import feedback_log
from mmrf_jax.data.readers.feedback_log import Record, UserLog
from mmrf_jax.io.progress import say
from mmrf_jax.serving import artifact, monitoring, ranker, users
from mmrf_jax.serving.ranker import Job, Ranker

STORE = "users.sqlite"
_FLUSH_SECONDS, _RELOAD_SECONDS, _RETRY_SECONDS = 0.5, 1.0, 10.0
_MOST_REQUESTS, _MOST_EVENTS = 256, 64  # per session, per request: a user's state is bounded


class Refused(Exception):
    """A rejected request, with its HTTP status."""

    def __init__(self, status: int, message: str, field: tuple[str | int, ...] = ()):
        super().__init__(message)
        self.status, self.message, self.field = status, message, field


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a service.

    Attributes:
      artifact: the folder of the artefact, or a link to it; when the link moves, the service swaps artefacts.
      log: the folder of the feedback log and the users' store.
      temperature: 0 serves the K best; above 0 samples Plackett–Luce on standardised scores divided by it, so that the
        log contains exploration.
      max_candidates: of one request.
      session_gap: seconds after which a user's next request begins a new session; a clock set back by more than that
        does too.
      users_in_memory: users whose state stays in memory, some 20 kB each; others are read from the store.
      seed: of the sampling, with user and request.
    """

    artifact: Path
    log: Path
    temperature: float = 0.0
    max_candidates: int = 400
    session_gap: float = 1_800.0
    users_in_memory: int = 20_000
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request for a slate; the caller has checked it against the spec, including ids and values.

    Attributes:
      user: id of the user.
      candidates: [c] int64, the platform's ids, all different.
      context: [Dx − 1]; the service adds the position in the session.
      k: number of videos wanted.
      profile: [Du], or None for the last one received.
      history: (videos [h], feedback [h, S]) of a user unknown to the service, oldest first.
      new_session: whether a session begins, however short the pause.
    """

    user: int
    candidates: np.ndarray
    context: np.ndarray
    k: int
    profile: np.ndarray | None = None
    history: tuple[np.ndarray, np.ndarray] | None = None
    new_session: bool = False


@dataclasses.dataclass(frozen=True)
class Slate:
    """A slate and all scores.

    Attributes:
      request: id of the request.
      artifact: id of the artefact that ranked.
      position: of the request in the session.
      videos: [k] in order.
      positions: [k] of the videos among the requested candidates.
      log_propensity: of the slate.
      scores: {agent: [c]}, NaN for a candidate unknown to the artefact.
      unknown: those candidates.
    """

    request: str
    artifact: str
    position: int
    videos: np.ndarray
    positions: np.ndarray
    log_propensity: float
    scores: dict[str, np.ndarray]
    unknown: list[int]


@dataclasses.dataclass
class _Memory:
    """A user's memory up to a request of a session, computed by one artefact."""

    artifact: str
    first: int  # number of the session's first request
    upto: int  # requests from this number on are not included
    value: tuple[np.ndarray, np.ndarray]


class Service:
    """Use it in one thread: create it, `await start()`, and `await close()` at the end."""

    def __init__(self, settings: Settings):
        """Load the artefact, compile it and open the store.

        Raises:
          ArtifactError: for an unusable artefact.
          ValueError: for a log that another process writes, or a damaged one.
        """
        self.settings = settings
        self._tried = settings.artifact.resolve()  # the last artefact found there
        self._ranker = self._loaded(None)
        spec = self._ranker.spec
        sizes = {"profile": spec.profile, "context": spec.context, "history": spec.history}
        self._log = feedback_log.Writer(settings.log, spec.signals, sizes)
        self._store = users.UserStore(
            settings.log / STORE, settings.log, spec.signals, spec.history, settings.users_in_memory
        )
        self.metrics = monitoring.Metrics(self._gauges())
        self.metrics.describe(self._ranker)
        self._memories: collections.OrderedDict[int, _Memory] = collections.OrderedDict()
        self._locks: weakref.WeakValueDictionary[int, asyncio.Lock] = weakref.WeakValueDictionary()
        self._queue: collections.deque[tuple[Ranker, Job, asyncio.Future]] = collections.deque()
        self._arrived = asyncio.Event()
        self._scorer = ThreadPoolExecutor(1, "score")
        self._syncer = ThreadPoolExecutor(1, "sync")
        self._syncing: asyncio.Task | None = None
        self._appended = self._synced = 0
        self._tasks: list[asyncio.Task] = []
        self._said_back = False
        self.failed_swap: str | None = None  # why the newest artefact does not rank

    @property
    def ranker(self) -> Ranker:
        """Return the artefact that ranks."""
        return self._ranker

    def _gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        return {
            "mmrf_users_in_memory": ("Users whose state is in memory.", lambda: self._store.in_memory),
            "mmrf_log_segment": ("Segment of the feedback log.", lambda: self._log.position.segment),
            "mmrf_log_offset_bytes": ("Bytes in that segment.", lambda: self._log.position.offset),
        }

    async def start(self) -> None:
        works = {"scoring": self._score_batches, "writing": self._flush, "looking for artefacts": self._reload}
        self._tasks = [asyncio.create_task(work(), name=name) for name, work in works.items()]

    @property
    def trouble(self) -> str | None:
        """Return why the service should be restarted; None if it works."""
        if self._log.failed is not None:
            return f"the feedback log cannot be written: {self._log.failed}"
        for task in self._tasks:
            if task.done():
                return f"{task.get_name()} has ended: {'stopped' if task.cancelled() else repr(task.exception())}"
        return None

    async def close(self) -> None:
        """Stop with everything on disk."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._scorer.shutdown()
        self._syncer.shutdown()
        try:
            self._log.close()
        finally:
            self._store.close(self._log.position)

    async def rank(self, asked: Asked) -> Slate:
        """Rank the candidates; the slate is in the log when this returns.

        Raises:
          Refused: if the artefact knows none of the candidates.
        """
        async with self._alone(asked.user):
            serving, known = self._ranker, self._store.get(asked.user)
            clock, gap = _now(), 1000.0 * self.settings.session_gap
            back = known.time - clock > gap  # the clock was ahead at the user's last request
            now = clock if back else max(clock, known.time)
            start = asked.new_session or known.over or back or now - known.time > gap
            start |= len(known.shown) >= _MOST_REQUESTS
            if back:
                self._say_back(known.time - clock)
            given = asked.history if start and not known.requests else None
            rows = serving.rows_of(asked.candidates)
            there = np.flatnonzero(rows >= 0)
            if not len(there):
                raise Refused(422, "the artefact knows none of these videos", ("body", "candidates"))
            position = 0 if start else len(known.shown)
            user, profile = serving.user_of(asked.user)
            for newer in (known.profile, asked.profile):
                profile = profile if newer is None else newer
            if profile is None:
                profile = np.zeros(serving.spec.profile, np.float32)
            context = np.append(asked.context, np.log1p(position)).astype(np.float32)
            memory, seen = self._since(asked.user, serving, start, given)
            scores, value = await self._scored(
                serving, Job(user, profile, context, rows[there], memory, *self._known(serving, seen))
            )
            # No await from here on: the request is both in the log and in the user's state, or in neither.
            number = known.requests
            rng = np.random.default_rng([self.settings.seed, asked.user, number])
            slate, logits, log_propensity = ranker.choose(scores[-1], asked.k, self.settings.temperature, rng)
            self._append(
                {
                    "kind": "rank",
                    "request": feedback_log.request_id(asked.user, number),
                    "user": asked.user,
                    "number": number,
                    "time": now,
                    "start": bool(start),
                    "history": given and {"videos": _bytes(given[0], "<i8"), "feedback": _bytes(given[1], "<f4")},
                    "profile": _bytes(profile, "<f4"),
                    "context": _bytes(context, "<f4"),
                    "candidates": _bytes(asked.candidates[there], "<i8"),
                    "scores": _bytes(logits, "<f4"),
                    "slate": _bytes(slate, "<u2"),
                    "log_propensity": log_propensity,
                    "artifact": serving.id,
                }
            )
            first = number if start else known.shown[0].number
            self._remember(asked.user, _Memory(serving.id, first, number, value))
        self.metrics.impressions.inc(len(slate))
        positions = there[slate]
        every = np.full((len(scores), len(rows)), np.nan, np.float32)
        every[:, there] = scores
        return Slate(
            request=feedback_log.request_id(asked.user, number),
            artifact=serving.id,
            position=position,
            videos=asked.candidates[positions],
            positions=positions,
            log_propensity=log_propensity,
            scores=dict(zip(serving.agents, every, strict=True)),
            unknown=asked.candidates[rows < 0].tolist(),
        )

    def _say_back(self, milliseconds: int) -> None:
        """Report once that the clock was set back."""
        if not self._said_back:
            self._said_back = True
            say(
                f"the clock is {milliseconds / 1000:,.0f} s behind the time of a user's last request; such users begin "
                "new sessions (said once)"
            )

    async def feedback(self, event: str, request: str, videos: np.ndarray, signals: np.ndarray, left: bool) -> bool:
        """Record feedback on a request; it is on disk when this returns. Return False for a repeated event.

        Args:
          event: id from the caller; repeating it changes nothing.
          request: id of the request.
          videos: [m] int64 of the slate.
          signals: [m, S].
          left: whether the user has left the session.

        Raises:
          Refused: for a request that does not exist or whose session is over, videos that it did not show, or too many
            events.
        """
        user, number = _parsed(request)
        async with self._alone(user):
            known = self._store.get(user)
            shown = known.request(number)
            if shown is None and number < known.requests:
                over = f"the session of request {request} is over; what was acknowledged of it before has counted"
                raise Refused(410, over, ("body", "request_id"))
            if shown is None:
                raise Refused(404, f"there was no request {request}", ("body", "request_id"))
            new = event not in shown.events
            if new:
                self._take(known, shown, event, request, videos, signals, left)
                memory = self._memories.get(user)
                if memory is not None and memory.first == known.shown[0].number and number < memory.upto:
                    del self._memories[user]  # it was computed without this event
        self.metrics.events.labels("new" if new else "duplicate").inc()
        await self._durable()
        return new

    def _take(self, known: UserLog, shown, event, request, videos, signals, left) -> None:
        strange = np.flatnonzero(~np.isin(videos, shown.videos))
        if len(strange):
            place = int(strange[0])
            message = f"video {videos[place]} was not shown by request {request}"
            raise Refused(422, message, ("body", "videos", place, "video"))
        if len(shown.events) >= _MOST_EVENTS:
            raise Refused(409, f"request {request} has {_MOST_EVENTS} events, no more are taken", ("body", "event_id"))
        self._append(
            {
                "kind": "feedback",
                "event": event,
                "request": request,
                "time": max(_now(), known.time),
                "videos": _bytes(videos, "<i8"),
                "feedback": _bytes(signals, "<f4"),
                "left": left,
            }
        )

    def _append(self, record: Record) -> None:
        try:
            self._log.append(record)
        except OSError as error:
            raise Refused(503, f"the feedback log cannot be written: {error.strerror}") from error
        self._appended += 1
        self._store.apply(record)

    def _alone(self, user: int) -> asyncio.Lock:
        lock = self._locks.get(user)
        if lock is None:
            self._locks[user] = lock = asyncio.Lock()
        return lock

    def _since(self, user: int, serving: Ranker, start: bool, given):
        """Return the cached memory of a user, and (videos, feedback) of exposures not in it."""
        known = self._store.get(user)
        if start:
            videos, feedback = known.exposures() if given is None else given
            last = max(len(videos) - serving.spec.history, 0)
            return None, (videos[last:], feedback[last:])
        memory = self._memories.get(user)
        if memory is None or (memory.artifact, memory.first) != (serving.id, known.shown[0].number):
            return None, known.exposures()
        answered = [s for s in known.shown[memory.upto - memory.first :] if s.answered]
        videos = np.concatenate([np.zeros(0, np.int64), *(s.videos for s in answered)])
        return memory.value, (
            videos,
            np.concatenate([np.zeros((0, len(serving.spec.signals)), np.float32), *(s.feedback for s in answered)]),
        )

    def _known(self, serving: Ranker, seen) -> tuple[np.ndarray, np.ndarray]:
        """Return exposures as item rows, without unknown videos."""
        rows = serving.rows_of(seen[0])
        return rows[rows >= 0], seen[1][rows >= 0]

    def _remember(self, user: int, memory: _Memory) -> None:
        self._memories[user] = memory
        self._memories.move_to_end(user)
        while len(self._memories) > self.settings.users_in_memory:
            self._memories.popitem(last=False)

    async def _scored(self, serving: Ranker, job: Job):
        future = asyncio.get_running_loop().create_future()
        self._queue.append((serving, job, future))
        self._arrived.set()
        return await future

    async def _score_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch: list[tuple[Ranker, Job, asyncio.Future]] = []
            while self._queue and len(batch) < ranker.BATCHES[-1]:
                if batch and self._queue[0][0] is not batch[0][0]:
                    break  # for another artefact
                one = self._queue.popleft()
                if not one[2].done():  # otherwise its caller has stopped waiting
                    batch.append(one)
            if not self._queue:
                self._arrived.clear()
            if not batch:
                continue
            self.metrics.batch.observe(len(batch))
            serving, jobs, began = batch[0][0], [job for _, job, _ in batch], time.perf_counter()
            try:
                answers: list[Any] = await loop.run_in_executor(self._scorer, serving.run, jobs)
            except Exception as error:  # of this batch alone; the next may succeed
                for _, _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            self.metrics.scoring.inc(time.perf_counter() - began)
            for (_, _, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    async def _durable(self) -> None:
        """Wait until all records appended so far are on disk; concurrent callers share one sync."""
        wanted = self._appended
        while self._synced < wanted:
            if self._syncing is None:
                self._syncing = asyncio.create_task(self._sync())
            await asyncio.shield(self._syncing)

    async def _sync(self) -> None:
        upto = self._appended
        try:
            await asyncio.get_running_loop().run_in_executor(self._syncer, self._log.sync)
            self._synced = max(self._synced, upto)
        except OSError as error:
            raise Refused(503, f"the feedback log cannot be written: {error.strerror}") from error
        finally:
            self._syncing = None

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            with contextlib.suppress(Refused):  # a full disk: requests report it to their callers
                await self._durable()
            position = self._log.position
            if self._store.position == position:
                continue
            rows: list[tuple[int, bytes]] = []
            for some in self._store.packed():
                rows += some
                await asyncio.sleep(0)  # lets pending requests run
            try:
                await asyncio.get_running_loop().run_in_executor(self._syncer, self._store.write, rows, position)
            except sqlite3.Error as error:  # the log has all data; the next pass may succeed
                self.metrics.failed_writes.inc()
                say(f"the users' store is not written: {error}")
                continue
            self._store.written(position)

    async def _reload(self) -> None:
        """Swap to another artefact when the link moves; retry one that cannot be used."""
        again = math.inf
        while True:
            await asyncio.sleep(_RELOAD_SECONDS)
            try:
                there = self.settings.artifact.resolve()
                if there == self._tried and time.monotonic() < again:
                    continue
                self._tried = there
                new = await asyncio.get_running_loop().run_in_executor(None, self._loaded, self._ranker)
            except Exception as error:  # on any error the current artefact keeps ranking
                again = time.monotonic() + _RETRY_SECONDS  # it may still be being copied
                said, self.failed_swap = self.failed_swap, str(error) or type(error).__name__
                self.metrics.failed_swaps.inc()
                if self.failed_swap != said:
                    say(f"artefact not changed: {self.failed_swap}")
                continue
            again = math.inf
            self._ranker, self.failed_swap = new, None
            self.metrics.swaps.inc()
            self.metrics.describe(new)
            say(f"now serving artefact {new.id}, {there}")

    def _loaded(self, before: Ranker | None) -> Ranker:
        loaded = artifact.load(self._tried, None if before is None else before.spec)
        ids = (loaded.arrays["catalogue"]["video_id"], loaded.arrays.get("users", {}).get("user_id", np.zeros(0, int)))
        if any(of.dtype.kind == "U" for of in ids):
            raise artifact.ArtifactError(
                f"{self._tried} was trained on string ids, and the service takes integers; rank with mmrf_jax.load, or "
                "number the ids of the log"
            )
        made = Ranker(loaded, self.settings.max_candidates)
        made.warm()
        return made


def _now() -> int:
    return int(time.time() * 1000)


def _bytes(values, dtype: str) -> bytes:
    return feedback_log.to_bytes(values, dtype)


def _parsed(request: str) -> tuple[int, int]:
    """Parse a request id into user and number."""
    user, _, number = request.partition("-")
    if not all(x.isascii() and x.isdigit() and len(x) <= 10 and str(int(x)) == x for x in (user, number)):
        raise Refused(404, f"there was no request {request[:40]!r}", ("body", "request_id"))
    return int(user), int(number)
