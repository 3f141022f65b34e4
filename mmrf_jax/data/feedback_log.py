"""The log of a ranking service: what was asked, shown and answered, appended as it happens, and read as sessions.

A log is a folder: `feedback_log.json`, which says what the records are made of, and segments `feedback-000000.log`, …
of about `SEGMENT_BYTES`. A segment is a sequence of frames,

    length of the record [u32] | CRC-32 of the record [u32] | record: a MessagePack map

little-endian, of two kinds of records. Arrays in them are the bytes of little-endian numbers; videos are called by the
platform's own ids.

    kind "rank"       request (its id), user, number (of the user's requests, from 0), time (ms since 1970, UTC),
                      start (bool, of a session), history: null or {videos [h] i64, feedback [h, S] f32} as the user
                      arrived with, profile [Du] f32, context [Dx] f32, candidates [c] i64, scores [c] f32 (the logits
                      of the slate, a Plackett–Luce draw, or its ranking where the draw had no chance in it), slate [k]
                      u16 positions in the candidates, log_propensity (of the slate), artifact (id of the ranker)
    kind "feedback"   event (its id), request, time, videos [m] i64, feedback [m, S] f32, left (bool: the session ends)

A record is in the log before its request is answered; a feedback is on the disk before it is acknowledged. An event may
be in the log once only, and `read` counts it once. What several events say of a video counts by the largest value of
each signal. A frame that a crash cut short can only be the last one: it was never acknowledged and is dropped.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from mmrf_jax import types
from mmrf_jax.data import sessions
from mmrf_jax.data.schema import Schema, SessionLog
from mmrf_jax.metrics import files

VERSION = 1
MANIFEST = "feedback_log.json"
SEGMENT_BYTES = 256 * 2**20
_FRAME = struct.Struct("<II")
_LONGEST = 2**26  # bytes of a record; a length beyond it is no length
S = len(types.SIGNALS)

Record = dict[str, Any]
RowsOf = Callable[[np.ndarray], np.ndarray]
Progress = Callable[[str, int], Callable[[int], None]]


class Position(NamedTuple):
    """A place between two records; positions of one log are in its order."""

    segment: int
    offset: int


START = Position(0, 0)


def is_log(folder: str | os.PathLike) -> bool:
    """Whether a folder is such a log."""
    return (Path(folder) / MANIFEST).is_file()


def to_bytes(values: np.ndarray, dtype: str) -> bytes:
    """An array as records hold it."""
    return np.ascontiguousarray(values, dtype).tobytes()


class Writer:
    """Appends to a log; one at a time, over all processes.

    Raises:
      ValueError: where another process has the log, or it was written by another version or is damaged before its end.
    """

    def __init__(self, folder: str | os.PathLike, segment_bytes: int = SEGMENT_BYTES):
        self.folder, self._limit = Path(folder), segment_bytes
        self._syncing = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(f"{self.folder} is written by another process; stop it or name another log") from None
        if not is_log(self.folder):
            files.write_json(self.folder / MANIFEST, {"version": VERSION, "signals": list(types.SIGNALS)})
        _check(self.folder)
        paths = _segments(self.folder)
        number = len(paths) - 1 if paths else 0
        end = 0
        if paths:
            for _, position in scan(self.folder, Position(number, 0)):
                end = position.offset
        self._open(number, end)

    def _open(self, number: int, end: int) -> None:
        self._file = os.open(_path(self.folder, number), os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._file, end)  # what a crash cut short
        os.lseek(self._file, end, os.SEEK_SET)
        directory = os.open(self.folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        self.position = Position(number, end)

    def append(self, record: Record) -> Position:
        """Hands a record to the system, which keeps it if this process dies; returns the position after it.

        Raises:
          OSError: where the disk is full; nothing of the record is left then.
        """
        if self.position.offset >= self._limit:
            with self._syncing:
                os.fdatasync(self._file)
                os.close(self._file)
                self._open(self.position.segment + 1, 0)
        frame = encode(record)
        written = 0
        try:
            while written < len(frame):
                written += os.write(self._file, frame[written:])
        except OSError:
            os.ftruncate(self._file, self.position.offset)
            os.lseek(self._file, self.position.offset, os.SEEK_SET)
            raise
        self.position = Position(self.position.segment, self.position.offset + len(frame))
        return self.position

    def sync(self) -> None:
        """Returns when all that was appended is on the disk; another thread may call it."""
        with self._syncing:
            os.fdatasync(self._file)

    def close(self) -> None:
        self.sync()
        os.close(self._file)
        self._lock.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def encode(record: Record) -> bytes:
    """A record as a frame."""
    packed = msgpack.packb(record)
    return _FRAME.pack(len(packed), zlib.crc32(packed)) + packed


def scan(folder: str | os.PathLike, after: Position = START) -> Iterator[tuple[Record, Position]]:
    """The records after a position, and the position behind each; a frame cut short at the very end is none.

    Raises:
      ValueError: for a damaged frame that others follow, naming file and offset.
    """
    folder = Path(folder)
    paths = _segments(folder)
    for number in range(after.segment, len(paths)):
        data = paths[number].read_bytes()
        at = after.offset if number == after.segment else 0
        while at < len(data):
            end = at + _FRAME.size
            if end <= len(data):
                length, crc = _FRAME.unpack_from(data, at)
                end += length
                if end <= len(data) and length <= _LONGEST and zlib.crc32(data[at + _FRAME.size : end]) == crc:
                    yield msgpack.unpackb(data[at + _FRAME.size : end]), Position(number, end)
                    at = end
                    continue
            if number == len(paths) - 1 and end >= len(data):
                return  # the crash that cut it came before it was acknowledged
            raise ValueError(
                f"{paths[number]} is damaged at byte {at} of {len(data)}; restore it from a copy, or cut it there and "
                "lose what follows"
            )


def end(folder: str | os.PathLike) -> Position:
    """The position behind the last byte of a log, or behind the last whole record where a writer has it."""
    paths = _segments(Path(folder))
    return Position(len(paths) - 1, paths[-1].stat().st_size) if paths else Position(0, 0)


def _segments(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("feedback-*.log"))
    for number, path in enumerate(paths):
        if path != _path(folder, number):
            raise ValueError(f"{_path(folder, number)} is missing though {path.name} is there; restore it from a copy")
    return paths


def _path(folder: Path, number: int) -> Path:
    return folder / f"feedback-{number:06d}.log"


def _check(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest.get("version") != VERSION or tuple(manifest.get("signals", ())) != types.SIGNALS:
        raise ValueError(
            f"{folder / MANIFEST} says {manifest}, this code has version {VERSION} and signals {types.SIGNALS}; "
            "use the code that wrote the log"
        )


class Shown:
    """A request of a session that goes on, and what its slate got."""

    __slots__ = ("answered", "events", "feedback", "number", "videos")

    def __init__(self, number: int, videos: np.ndarray):
        self.number = number  # of the user's requests
        self.videos = videos  # [k] int64, as shown
        self.feedback = np.zeros((len(videos), S), np.float32)
        self.answered = False  # whether any feedback has come
        self.events: set[str] = set()


class UserLog:
    """What a log says of one user: how the session began that goes on, and its requests. Records make it, in order.

    Attributes:
      history_videos [h ≤ H] int64, history_feedback [h, S]: exposures before the session, oldest first.
      shown: the session's requests. requests: how many the user has made in all. profile: [Du], the last one given.
      time: of the last record, ms. over: whether the user has left the session.
    """

    __slots__ = ("history_feedback", "history_videos", "over", "profile", "requests", "shown", "time")

    def __init__(self) -> None:
        self.history_videos = np.zeros(0, np.int64)
        self.history_feedback = np.zeros((0, S), np.float32)
        self.shown: list[Shown] = []
        self.requests = 0
        self.profile: np.ndarray | None = None
        self.time = 0
        self.over = True

    def exposures(self) -> tuple[np.ndarray, np.ndarray]:
        """(videos [e], feedback [e, S]) of the history and the session, oldest first; what got no answer left out."""
        told = [s for s in self.shown if s.answered]
        videos = np.concatenate([self.history_videos, *(s.videos for s in told)])
        return videos, np.concatenate([self.history_feedback, *(s.feedback for s in told)])

    def apply(self, record: Record, history: int) -> Shown | None:
        """Takes the next record of the user; one that was taken before changes nothing.

        Args:
          history: H, exposures kept of what was before a session.

        Returns:
          The request that a feedback is about, where it says something new of it; None for a feedback that came before
          or whose session is over, and for requests.
        """
        if record["kind"] == "rank":
            if record["number"] < self.requests:
                return None  # taken before
            if record["start"]:
                given = record["history"]
                if given is None:
                    videos, feedback = self.exposures()
                else:
                    videos = np.frombuffer(given["videos"], "<i8")
                    feedback = np.frombuffer(given["feedback"], "<f4").reshape(-1, S)
                self.history_videos = videos[max(len(videos) - history, 0) :]
                self.history_feedback = feedback[max(len(videos) - history, 0) :]
                self.shown, self.over = [], False
            candidates = np.frombuffer(record["candidates"], "<i8")
            self.shown.append(Shown(record["number"], candidates[np.frombuffer(record["slate"], "<u2")]))
            self.requests = record["number"] + 1
            self.profile = np.frombuffer(record["profile"], "<f4")
            self.time = record["time"]
            return None
        shown = self.request(int(record["request"].rpartition("-")[2]))
        if shown is None or record["event"] in shown.events:
            return None
        shown.events.add(record["event"])
        shown.answered = True
        place = {int(v): i for i, v in enumerate(shown.videos)}
        told = np.frombuffer(record["feedback"], "<f4").reshape(-1, S)
        for video, signals in zip(np.frombuffer(record["videos"], "<i8"), told, strict=True):
            i = place[int(video)]
            shown.feedback[i] = np.maximum(shown.feedback[i], signals)
        self.over |= record["left"]
        self.time = record["time"]
        return shown

    def request(self, number: int) -> Shown | None:
        """The request of a number where it is of the last session."""
        place = number - self.shown[0].number if self.shown else -1
        return self.shown[place] if 0 <= place < len(self.shown) else None


def request_id(user: int, number: int) -> str:
    return f"{user}-{number}"


def user_of(record: Record) -> int:
    """The user of a record."""
    return record["user"] if record["kind"] == "rank" else int(record["request"].rpartition("-")[0])


def read(
    folder: str | os.PathLike,
    schema: Schema,
    rows_of: RowsOf,
    progress: Progress = lambda name, total: lambda done: None,
) -> tuple[SessionLog, Record]:
    """A whole log as sessions to learn from.

    A request without any feedback is left out, and the session goes on behind it as another: nobody knows what the
    user did. Of a request with more candidates than the schema's C the slate is kept and C − k others drawn; one with
    fewer is left out. A session that the user has not left counts as truncated.

    Args:
      schema: of the sessions wanted.
      rows_of: videos [n] int64 by the platform's ids -> rows of the catalogue [n], −1 where it has none; candidates
        that it does not have are left out, and so is a request that showed one.
      progress: (name, bytes) -> what is called with the bytes read so far.

    Returns:
      The log, in the order of users and times, and a report: {"records", "requests", "feedback", "sessions",
      "left_out": {why: requests}}.

    Raises:
      ValueError: for a log of another version or schema, a damaged one, or one without a session to learn from.
    """
    folder = Path(folder)
    _check(folder)
    cut, number = _Cutter(schema, rows_of), 0
    before = np.cumsum([0, *(path.stat().st_size for path in _segments(folder))])
    report = progress("read", max(int(before[-1]), 1))
    for number, (record, position) in enumerate(scan(folder), 1):
        cut.take(record)
        if number % 256 == 0:
            report(int(before[position.segment]) + position.offset)
    report(max(int(before[-1]), 1))
    log = cut.log()
    if not log.num_sessions:
        raise ValueError(f"{folder} has no session to learn from ({cut.report}); collect feedback first")
    return log, cut.report | {"records": number, "sessions": log.num_sessions}


class _Asked(NamedTuple):
    """A request of a session that is being read."""

    context: np.ndarray
    candidates: np.ndarray  # rows, C of them
    slate: np.ndarray  # [K] positions, −1 where fewer were shown
    scores: np.ndarray
    log_propensity: float
    shown: Shown


class _Cutter:
    """Puts the records of all users together into sessions."""

    def __init__(self, schema: Schema, rows_of: RowsOf):
        self._schema, self._rows_of = schema, rows_of
        self._users: dict[int, UserLog] = {}
        self._open: dict[int, tuple[Record, UserLog, list[_Asked | None]]] = {}
        self._sessions: list[dict[str, Any]] = []
        self._requests: list[_Asked] = []
        self.report: Record = {
            "requests": 0,
            "feedback": 0,
            "left_out": {"unanswered": 0, "few_candidates": 0, "unknown_videos": 0},
        }

    def take(self, record: Record) -> None:
        user = user_of(record)
        known = self._users.setdefault(user, UserLog())
        if record["kind"] == "feedback":
            self.report["feedback"] += known.apply(record, self._schema.history) is not None
            return
        if record["start"]:
            self._close(user)
        known.apply(record, self._schema.history)
        self.report["requests"] += 1
        if record["start"] or user not in self._open:
            self._open[user] = (record, known, [])
        self._open[user][2].append(self._asked(record, known.shown[-1]))

    def _asked(self, record: Record, shown: Shown) -> _Asked | None:
        s = self._schema
        context = np.frombuffer(record["context"], "<f4")
        for name, found, wanted in (
            ("profile", len(record["profile"]) // 4, s.profile),
            ("context", len(context), s.context),
        ):
            if found != wanted:
                raise ValueError(
                    f"request {record['request']} has {name} of {found} numbers, the config's schema has {wanted}; use "
                    "the config of the run that was served"
                )
        slate = np.frombuffer(record["slate"], "<u2").astype(np.int64)
        rows = np.asarray(self._rows_of(np.frombuffer(record["candidates"], "<i8")), np.int64)
        scores = np.frombuffer(record["scores"], "<f4")
        if (rows[slate] < 0).any() or len(slate) > s.slate:
            self.report["left_out"]["unknown_videos"] += 1
            return None
        others = np.setdiff1d(np.flatnonzero(rows >= 0), slate)
        if len(slate) + len(others) < s.candidates:
            self.report["left_out"]["few_candidates"] += 1
            return None
        if len(slate) + len(others) > s.candidates:
            rng = np.random.default_rng([record["user"], record["number"]])
            others = rng.choice(others, s.candidates - len(slate), replace=False)
        kept = np.sort(np.concatenate([slate, others]))
        positions = np.full(s.slate, -1, np.int32)
        positions[: len(slate)] = np.searchsorted(kept, slate)
        return _Asked(context, rows[kept].astype(np.int32), positions, scores[kept], record["log_propensity"], shown)

    def _close(self, user: int) -> None:
        """Ends the session of a user: one session of the log for each stretch of requests that can be used."""
        if user not in self._open:
            return
        record, known, asked = self._open.pop(user)
        videos, feedback = known.history_videos, known.history_feedback
        stretch: list[_Asked] = []
        for i, request in enumerate([*asked, None]):
            shown = known.shown[i] if i < len(asked) else None
            if request is not None and request.shown.answered:
                if not stretch:
                    before = videos, feedback
                stretch.append(request)
            else:
                if request is not None:
                    self.report["left_out"]["unanswered"] += 1
                if stretch:
                    self._emit(user, record, before, stretch, known.over and shown is None)
                    stretch = []
            if shown is not None and shown.answered:
                videos, feedback = np.concatenate([videos, shown.videos]), np.concatenate([feedback, shown.feedback])

    def _emit(self, user, record, before, stretch, terminated) -> None:
        s = self._schema
        videos, feedback = before
        rows = np.asarray(self._rows_of(videos), np.int64)
        rows, feedback = rows[rows >= 0][-s.history :], feedback[rows >= 0][-s.history :]
        empty = s.history - len(rows)
        day = datetime.datetime.fromtimestamp(record["time"] / 1000, datetime.UTC)
        self._sessions.append(
            {
                "user_id": user,
                "date": int(day.strftime("%Y%m%d")),
                "time": record["time"],
                "profile": np.frombuffer(record["profile"], "<f4"),
                "history_videos": np.concatenate([np.zeros(empty, np.int32), rows]),
                "history_feedback": np.concatenate([np.zeros((empty, S), np.float32), feedback]),
                "history_mask": np.arange(s.history) >= empty,
                "terminated": terminated,
                "requests": len(stretch),
            }
        )
        self._requests += stretch

    def log(self) -> SessionLog:
        """All sessions; those that go on are cut."""
        for user in list(self._open):
            self._close(user)
        s, made = self._schema, self._sessions
        column = lambda name, shape, dtype: np.array([x[name] for x in made], dtype).reshape(len(made), *shape)
        lengths = column("requests", (), np.int64)
        slots = [np.zeros((s.slate, S), np.float32) for _ in self._requests]
        for slot, request in zip(slots, self._requests, strict=True):
            slot[: len(request.shown.feedback)] = request.shown.feedback
        rows = lambda values, shape, dtype: np.array(values, dtype).reshape(len(self._requests), *shape)
        terminated = column("terminated", (), bool)
        log = SessionLog(
            user_id=column("user_id", (), np.int32),
            date=column("date", (), np.int32),
            profile=column("profile", (s.profile,), np.float32),
            history_videos=column("history_videos", (s.history,), np.int32),
            history_feedback=column("history_feedback", (s.history, S), np.float32),
            history_mask=column("history_mask", (s.history,), bool),
            terminated=terminated,
            truncated=~terminated,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            context=rows([r.context for r in self._requests], (s.context,), np.float32),
            candidates=rows([r.candidates for r in self._requests], (s.candidates,), np.int32),
            slate=rows([r.slate for r in self._requests], (s.slate,), np.int32),
            feedback=rows(slots, (s.slate, S), np.float32),
            log_propensity=rows([r.log_propensity for r in self._requests], (), np.float32),
            scores=rows([r.scores for r in self._requests], (s.candidates,), np.float32),
        )
        order = np.lexsort((column("time", (), np.int64), log.user_id))
        return sessions.select_sessions(log, order)
