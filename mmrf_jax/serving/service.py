"""The ranking service without HTTP: it ranks for users, logs everything, and swaps artefacts while it runs.

One event loop owns users, log and store; one thread scores. Requests of one user wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mmrf_jax.data import named_features
from mmrf_jax.data.readers import feedback_log
from mmrf_jax.data.readers.feedback_log import Record, UserLog
from mmrf_jax.io import copies, storage
from mmrf_jax.io.progress import say
from mmrf_jax.serving import monitoring, new_items, ranker, traffic, users
from mmrf_jax.serving.memories import Memories, Memory
from mmrf_jax.serving.ranker import Job, Ranker
from mmrf_jax.serving.requests import Asked, Refused, Settings, Slate
from mmrf_jax.serving.scoring import Scorer

__all__ = ["Asked", "Refused", "Service", "Settings", "Slate"]

STORE = "users.sqlite"
_FLUSH_SECONDS = 0.5
_MOST_REQUESTS, _MOST_EVENTS = 256, 64  # per session, per request: a user's state is bounded
_REQUEST = re.compile(r"(.+)-(0|[1-9][0-9]{0,9})", re.DOTALL)
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}", re.ASCII)


class Service:
    """Use it in one thread: create it, `await start()`, and `await close()` at the end."""

    def __init__(self, settings: Settings):
        """Load the artefact, compile it and open the store.

        Raises:
          ArtifactError: for an unusable artefact.
          ValueError: for a log that another process writes, or a damaged one.
        """
        self.settings = settings
        self._arms = traffic.Arms(settings)
        spec = self.ranker.spec
        sizes = {"profile": spec.profile, "context": spec.context, "history": spec.history}
        self._log = feedback_log.Writer(settings.log, spec.signals, sizes)
        # SQLite needs a disk; in object storage there is the log alone, from which the store is made at each start.
        store = (copies.scratch("users") if storage.is_remote(settings.log) else settings.log) / STORE
        self._store = users.UserStore(store, settings.log, spec.signals, spec.history, settings.users_in_memory)
        self.metrics = monitoring.Metrics(self._gauges())
        self.metrics.describe(self._arms.rankers)
        for serving in self._arms.rankers:
            traffic.add_stored(serving, list(self._store.items.values()))
        self._adding = asyncio.Lock()
        self._memories = Memories(settings.users_in_memory)
        self._locks: weakref.WeakValueDictionary[int | str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._scorer = Scorer(self.metrics)
        self._syncer = ThreadPoolExecutor(1, "sync")
        self._syncing: asyncio.Task | None = None
        self._appended = self._synced = 0
        self._tasks: list[asyncio.Task] = []
        self._said_back = False
        for warning in self.warnings:
            say(f"warning: {warning}")

    @property
    def ranker(self) -> Ranker:
        """Return the artefact that ranks, of arm a."""
        return self._arms.all[0].ranker

    @property
    def rankers(self) -> dict[str, Ranker]:
        """Return the artefact of each arm."""
        return {arm.name: arm.ranker for arm in self._arms.all}

    @property
    def failed_swap(self) -> str | None:
        """Return why a newest artefact does not rank."""
        return self._arms.failed_swap

    @property
    def warnings(self) -> list[str]:
        """Return what is likely not meant."""
        if self.settings.temperature > 0.0:
            return []
        return [
            "temperature 0 always serves the best slate, so the log has no usable propensities: no other policy can be "
            "estimated from it, and nothing else is explored; serve with a temperature above 0, such as 0.25"
        ]

    def _gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        return {
            "mmrf_users_in_memory": ("Users whose state is in memory.", lambda: self._store.in_memory),
            "mmrf_log_segment": ("Segment of the feedback log.", lambda: self._log.position.segment),
            "mmrf_log_offset_bytes": ("Bytes in that segment.", lambda: self._log.position.offset),
        }

    async def start(self) -> None:
        works = {"scoring": self._scorer.work, "writing": self._flush, "looking for artefacts": self._reload}
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
        self._scorer.close()
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
            arm, known = self._arms.of(asked.user), self._store.get(asked.user)
            serving = arm.ranker
            now, start = self._session(asked, known)
            given = asked.history if start and not known.requests else None
            rows = serving.rows_of(asked.candidates)
            there = np.flatnonzero(rows >= 0)
            if not len(there):
                raise self._none_known(asked)
            position = 0 if start else len(known.shown)
            user, profile = _user(serving, asked, known)
            context = _vector(serving, "context", asked.context, ("body", "context"))
            context = np.append(context, np.log1p(position)).astype(np.float32)
            seen = self._memories.since(asked.user, known, serving, start, given)
            scores, value = await self._scorer.score(serving, Job(user, profile, context, rows[there], *seen))
            # No await from here on: the request is both in the log and in the user's state, or in neither.
            number = known.requests
            rng = np.random.default_rng([self.settings.seed, feedback_log.user_number(asked.user), number])
            slate, logits, log_propensity = ranker.choose(scores[-1], asked.k, self.settings.temperature, rng)
            self._append(
                {
                    "kind": "rank",
                    "request": feedback_log.request_id(asked.user, number),
                    "user": asked.user,
                    "number": number,
                    "time": now,
                    "start": start,
                    "history": None if given is None else _history(*given),
                    "profile": _bytes(profile, "<f4"),
                    "context": _bytes(context, "<f4"),
                    "candidates": feedback_log.pack_ids(asked.candidates[there]),
                    "scores": _bytes(logits, "<f4"),
                    "slate": _bytes(slate, "<u2"),
                    "log_propensity": log_propensity,
                    "artifact": serving.id,
                    "arm": arm.name,
                }
            )
            first = number if start else known.shown[0].number
            self._memories.hold(asked.user, Memory(serving.id, first, number, value))
        self.metrics.impressions.inc(len(slate))
        positions = there[slate]
        every = np.full((len(scores), len(rows)), np.nan, np.float32)
        every[:, there] = scores
        return Slate(
            request=feedback_log.request_id(asked.user, number),
            artifact=serving.id,
            arm=arm.name,
            position=position,
            videos=asked.candidates[positions],
            positions=positions,
            log_propensity=log_propensity,
            scores=dict(zip(serving.agents, every, strict=True)),
            unknown=asked.candidates[rows < 0].tolist(),
            unknown_history=[] if given is None else given[0][serving.rows_of(given[0]) < 0].tolist(),
        )

    async def rank_all(self, asked: Sequence[Asked]) -> list[Slate]:
        """Rank for several requests in one batch, as `rank` does for each; those of one user wait for each other.

        Raises:
          Refused: as `rank`, with the request's place; nothing is ranked if an artefact knows no candidate of one.
        """
        for place, one in enumerate(asked):
            if (self._arms.of(one.user).ranker.rows_of(one.candidates) < 0).all():
                refused = self._none_known(one)
                raise Refused(refused.status, refused.message, ("body", place, *refused.field[1:]))
        done = await asyncio.gather(*(self.rank(one) for one in asked), return_exceptions=True)
        slates = []
        for place, slate in enumerate(done):
            if isinstance(slate, Refused):
                raise Refused(slate.status, slate.message, ("body", place, *slate.field[1:]))
            if isinstance(slate, BaseException):
                raise slate
            slates.append(slate)
        return slates

    def _none_known(self, asked: Asked) -> Refused:
        some = ", ".join(repr(video) for video in asked.candidates[:5].tolist())
        more = f" and {len(asked.candidates) - 5} more" if len(asked.candidates) > 5 else ""
        message = f"the artefact knows none of the videos {some}{more}; describe them in items"
        return Refused(422, message, ("body", "candidates"))

    async def add_items(self, items: Sequence[Record], field: tuple[str | int, ...] = ("body", "items")) -> list[bool]:
        """Take items that the artefacts do not have, for all later requests; they are on disk when this returns.

        Args:
          items: {"id", "features", "author", "tag", "duration"}, of different ids; see `serving.new_items`.
          field: the field of the request that holds them.

        Returns:
          For each whether it is new; a known one stays as it is.

        Raises:
          Refused: for features that do not fit, naming item and field, or for more items than there is room for.
        """
        async with self._adding:
            ids = feedback_log.ids_of([item["id"] for item in items])
            known = np.array([serving.rows_of(ids) >= 0 for serving in self._arms.rankers]).all(axis=0)
            known |= np.array([item["id"] in self._store.items for item in items], bool)
            new = [item for item, there in zip(items, known, strict=True) if not there]
            for place, item in enumerate(items):
                self._check(item, (*field, place))
            room = min(serving.room for serving in self._arms.rankers)
            if len(new) > room:
                message = f"{len(new)} items are new and there is room for {room}; serve an artefact trained on them"
                raise Refused(409, message, field)
            for item in new:
                self._append({"kind": "item", "time": _now(), **item})
            for serving in self._arms.rankers:
                await self._scorer.run(serving.add, new)
        if new:
            self.metrics.new_items.inc(len(new))
            await self._durable()
        return (~known).tolist()

    def _check(self, item: Record, field: tuple[str | int, ...]) -> None:
        for serving in self._arms.rankers:
            try:
                serving.check(item)
            except new_items.Undescribed as error:
                raise Refused(422, f"item {item['id']!r}: {error.message}", (*field, error.field)) from error

    def _session(self, asked: Asked, known: UserLog) -> tuple[int, bool]:
        """Return the time of a request in milliseconds, and whether a session begins with it."""
        clock, gap = _now(), 1000.0 * self.settings.session_gap
        back = known.time - clock > gap  # the clock was ahead at the user's last request
        if back:
            self._say_back(known.time - clock)
        now = clock if back else max(clock, known.time)
        start = asked.new_session or known.over or back or now - known.time > gap
        return now, bool(start or len(known.shown) >= _MOST_REQUESTS)

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
        user, number = self._parsed(request)
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
                self._take(user, known, shown, event, request, videos, signals, left)
                self._memories.answered(user, known.shown[0].number, number)
        self.metrics.events.labels("new" if new else "duplicate").inc()
        await self._durable()
        return new

    def _take(self, user, known: UserLog, shown, event, request, videos, signals, left) -> None:
        strange = np.flatnonzero(~np.isin(videos, shown.videos))
        if len(strange):
            place = int(strange[0])
            message = f"video {videos[place].item()} was not shown by request {request}"
            raise Refused(422, message, ("body", "videos", place, "video"))
        if len(shown.events) >= _MOST_EVENTS:
            raise Refused(409, f"request {request} has {_MOST_EVENTS} events, no more are taken", ("body", "event_id"))
        self._append(
            {
                "kind": "feedback",
                "event": event,
                "request": request,
                "user": user,
                "time": max(_now(), known.time),
                "videos": feedback_log.pack_ids(videos),
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

    def _alone(self, user: int | str) -> asyncio.Lock:
        lock = self._locks.get(user)
        if lock is None:
            self._locks[user] = lock = asyncio.Lock()
        return lock

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
            rows: list[tuple[int | str, bytes]] = []
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
        """Swap to another artefact when a link moves; retry one that cannot be used."""
        while True:
            await asyncio.sleep(traffic.RELOAD_SECONDS)
            for arm in self._arms.all:
                try:
                    new = await self._arms.changed(arm)
                except Exception:  # `changed` has said it; the current artefact keeps ranking
                    self.metrics.failed_swaps.inc()
                    continue
                if new is None:
                    continue
                async with self._adding:
                    await self._scorer.run(traffic.add_stored, new, list(self._store.items.values()))
                    arm.ranker, arm.failed_swap = new, None
                self.metrics.swaps.inc()
                self.metrics.describe(self._arms.rankers)
                say(f"now serving artefact {new.id}, {arm.tried}" + (f", in arm {arm.name}" if arm.name != "a" else ""))

    def _parsed(self, request: str) -> tuple[int | str, int]:
        """Parse a request id into user and number."""
        found = _REQUEST.fullmatch(request)
        user = found[1] if found else ""
        if found and self.ranker.user_ids == "string":
            return user, int(found[2])
        if not found or not _INTEGER.fullmatch(user) or not -(2**63) <= int(user) < 2**63:
            raise Refused(404, f"there was no request {request[:40]!r}", ("body", "request_id"))
        return int(user), int(found[2])


def _user(serving: Ranker, asked: Asked, known: UserLog) -> tuple[int, np.ndarray]:
    """Return the user's row, and the profile: of the request, else of an earlier one, else of the artefact."""
    user, profile = serving.user_of(asked.user)
    for newer in (known.profile, _vector(serving, "profile", asked.profile, ("body", "user", "profile"))):
        profile = profile if newer is None else newer
    return user, np.zeros(serving.spec.profile, np.float32) if profile is None else profile


def _vector(serving: Ranker, kind: str, given, field: tuple[str | int, ...]) -> Any:
    """Return features that are given as numbers or by name; None if they are left out."""
    if not isinstance(given, Mapping):
        return given
    try:
        return named_features.encode_named(serving.names[kind], given)
    except ValueError as error:
        raise Refused(422, str(error), field) from error


def _now() -> int:
    return int(time.time() * 1000)


def _history(videos: np.ndarray, feedback: np.ndarray) -> dict[str, bytes | list[str]]:
    return {"videos": feedback_log.pack_ids(videos), "feedback": _bytes(feedback, "<f4")}


def _bytes(values, dtype: str) -> bytes:
    return feedback_log.to_bytes(values, dtype)
