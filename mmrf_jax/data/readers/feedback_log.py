"""The log of a ranking service: requests, slates and feedback, appended as they happen.

A log is a folder: `feedback_log.json`, which describes the contents of records, and segments `feedback-000000.log`, …
of about `SEGMENT_BYTES`. A segment is a sequence of frames,

    length of the record [u32] | CRC-32 of that length [u32] | CRC-32 of the record [u32] | record: a MessagePack map

little-endian, with three kinds of records. Arrays in records are the bytes of little-endian numbers. Users and videos
have the platform's ids: 64-bit integers, in arrays as i64, or strings, in arrays as lists of them.

    kind "rank"       request (its id), user, number (of the user's requests, from 0), time (ms since 1970, UTC),
                      start (bool, of a session), history: null or {videos [h] i64, feedback [h, S] f32} from before
                      the user's first request, profile [Du] f32, context [Dx] f32, candidates [c] i64, scores [c] f32
                      (logits that the slate was sampled from by Plackett–Luce, or ranked by if deterministic), slate
                      [k] u16 positions in the candidates, log_propensity (of the slate), artifact (id of the ranker),
                      arm ("a", or "b" of a traffic split)
    kind "feedback"   event (its id), request, user, time, videos [m] i64, feedback [m, S] f32, left (bool: the session
                      ends)
    kind "item"       id, time, and what was said of an item that no ranker had: features ({name: value} or [numbers],
                      or null), author and tag (as given, or null), duration (s)

A record is in the log before its request is answered; feedback is on disk before it is acknowledged. An event counts
once. If several events concern a video, the largest number of each signal counts, of signals of kind `value` the last
that is not 0. A killed process can truncate the last frame, and a power loss can leave zeros after it. Neither was
acknowledged, so both are dropped. Any other deviation is damage, and an error.

`feedback_sessions` converts a log to training sessions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from mmrf_jax.io import appending, files, storage
from mmrf_jax.io.progress import say
from mmrf_jax.signals import Signals

VERSION = 1
MANIFEST = "feedback_log.json"
SEGMENT_BYTES = 256 * 2**20
_FRAME = struct.Struct("<III")

Record = dict[str, Any]
RowsOf = Callable[[np.ndarray], np.ndarray]


class Position(NamedTuple):
    """A position between two records; positions of one log compare in log order."""

    segment: int
    offset: int


START = Position(0, 0)


def is_log(folder: str | os.PathLike) -> bool:
    """Return whether a folder is a feedback log."""
    return (storage.path(folder) / MANIFEST).is_file()


def rows_by_id(video_ids: np.ndarray) -> RowsOf:
    """Return a function from the platform's ids [n] to item rows [n], −1 for an unknown video.

    Args:
      video_ids: [V] ids of the item rows, integers or strings, all different, in any order.
    """
    ids = np.asarray(video_ids)
    text = ids.dtype.kind == "U"
    ids = ids if text else ids.astype(np.int64)  # so are those of 64 bits without a sign, here and in requests
    order = np.argsort(ids, kind="stable")
    ids = ids[order]

    def rows_of(videos: np.ndarray) -> np.ndarray:
        if not len(videos) or not len(ids):
            return np.full(len(videos), -1)
        if (videos.dtype.kind == "U") != text:
            kinds = ("strings", "integers") if text else ("integers", "strings")
            given = videos.tolist()[0]
            raise ValueError(f"the ids are {kinds[0]}, and {given!r} is of the {kinds[1]}; give ids in their type")
        wanted = videos if text else videos.astype(np.int64)
        place = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
        return np.where(ids[place] == wanted, order[place], -1)

    return rows_of


def to_bytes(values: np.ndarray, dtype: str) -> bytes:
    """Convert an array to the bytes stored in records."""
    return np.ascontiguousarray(values, dtype).tobytes()


def ids_of(given: Sequence[int | str]) -> np.ndarray:
    """Return ids [n], all integers or all strings, as an array of int64 or of strings."""
    return np.array(given, np.str_ if given and isinstance(given[0], str) else np.int64)


def pack_ids(ids: np.ndarray) -> bytes | list[str]:
    """Convert ids [n], integers or strings, to the form stored in records."""
    return ids.tolist() if ids.dtype.kind == "U" else to_bytes(ids, "<i8")


def unpack_ids(stored: bytes | list[str]) -> np.ndarray:
    """Return the ids [n] of `pack_ids`, int64 or strings."""
    return np.frombuffer(stored, "<i8") if isinstance(stored, bytes) else np.array(stored, np.str_)


def user_number(user: int | str) -> int:
    """Return a number that seeds or hashes by user: of an id >= 0 itself, of any other a hash of 64 bits."""
    if isinstance(user, int) and user >= 0:
        return user
    return int.from_bytes(hashlib.blake2b(str(user).encode(), digest_size=8).digest(), "little")


class Writer:
    """Appends to a log; only one writer at a time over all processes."""

    def __init__(
        self,
        folder: str | os.PathLike,
        signals: Signals,
        sizes: dict[str, int] | None = None,
        segment_bytes: int = SEGMENT_BYTES,
    ):
        """Open or create the log.

        Args:
          folder: folder of the log.
          signals: of the feedback, stored with the log.
          sizes: sizes of the arrays in records, such as {"profile": 20}, common to the whole log and stored with it.
          segment_bytes: size at which a new segment begins.

        Raises:
          ValueError: if another process holds the log, or it is damaged, or of another version, other signals or sizes.
        """
        self.folder, self._limit = storage.path(folder), segment_bytes
        self._failed: OSError | None = None
        self._full: list[
            appending.DiskFile | appending.PartsFile
        ] = []  # files of full segments, which `sync` syncs and closes
        self._syncing = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.held(self.folder))
            self._open(signals, sizes)
            self._lock = stack.pop_all()

    def _open(self, signals: Signals, sizes: dict[str, int] | None) -> None:
        if not is_log(self.folder):
            about = {"version": VERSION, "signals": list(signals.names), "sizes": sizes or {}}
            files.write_json(self.folder / MANIFEST, about)
        check(self.folder, signals, sizes)
        paths = segments(self.folder)
        number, end = max(len(paths) - 1, 0), 0
        if paths:
            for _, position in scan(self.folder, Position(number, 0)):
                end = position.offset
            if cut := paths[-1].stat().st_size - end:
                say(f"{paths[-1]}: the last {cut} bytes are of a record that was cut short, and are dropped")
        self._file = self._opened(number, end)

    def _opened(self, number: int, end: int) -> appending.DiskFile | appending.PartsFile:
        file = appending.open_to_append(_path(self.folder, number), end)
        self.position = Position(number, end)
        return file

    def append(self, record: Record) -> Position:
        """Write a record to the operating system, so that it survives the process; return the position after it.

        In object storage it survives once `sync` has been called.

        Raises:
          OSError: if the disk is full (no part of the record then remains), or if `sync` has failed.
        """
        if self._failed is not None:
            raise self._failed
        if self.position.offset >= self._limit or self._file.full:
            new = self._opened(self.position.segment + 1, 0)
            # In this order, for `sync` in another thread: a file that fills meanwhile is then in one of both.
            self._full.append(self._file)
            self._file = new
        frame = encode(record)
        self._file.append(frame)
        self.position = Position(self.position.segment, self.position.offset + len(frame))
        return self.position

    def sync(self) -> None:
        """Wait until all appended records are on disk, the oldest first; another thread may call it.

        Raises:
          OSError: if this cannot be ensured. The system may have dropped unwritten data without reporting it again, so
            no further record is accepted; a restart reads the data that is on disk.
        """
        with self._syncing:
            if self._failed is not None:
                raise self._failed
            try:
                last, full = self._file, list(self._full)
                for file in full:
                    file.sync()
                    file.close()
                    self._full.remove(file)
                if last not in full:
                    last.sync()
            except OSError as error:
                self._failed = error
                raise

    @property
    def failed(self) -> OSError | None:
        """Return why no further record is accepted; None if records are accepted."""
        return self._failed

    def close(self) -> None:
        try:
            self.sync()
        finally:
            self._file.close()
            self._lock.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def encode(record: Record) -> bytes:
    """Encode a record as a frame."""
    packed = msgpack.packb(record)
    return _FRAME.pack(len(packed), _crc_of(len(packed)), zlib.crc32(packed)) + packed


def _crc_of(length: int) -> int:
    return zlib.crc32(length.to_bytes(4, "little"))


def scan(folder: str | os.PathLike, after: Position = START) -> Iterator[tuple[Record, Position]]:
    """Yield the records after a position, each with the position after it; skip a truncated frame at the very end.

    Raises:
      ValueError: for a damaged frame, naming file and offset.
    """
    folder = storage.path(folder)
    paths = segments(folder)
    for number in range(after.segment, len(paths)):
        data = paths[number].read_bytes()
        at = after.offset if number == after.segment else 0
        while at < len(data):
            start = at + _FRAME.size
            cut, whole = start > len(data), False
            if not cut:
                length, crc_of_length, crc = _FRAME.unpack_from(data, at)
                if length and crc_of_length == _crc_of(length):
                    cut = start + length > len(data)
                    whole = not cut and zlib.crc32(data[start : start + length]) == crc
            if whole:
                at = start + length
                yield msgpack.unpackb(data[start:at]), Position(number, at)
                continue
            if number == len(paths) - 1 and (cut or not any(data[at:])):
                return
            raise ValueError(
                f"{paths[number]} is damaged at byte {at} of {len(data)}; restore it from a copy, or cut it there and "
                "lose what follows"
            )


def end(folder: str | os.PathLike) -> Position:
    """Return the position after the last byte of a log, or after the last whole record if a writer holds it."""
    paths = segments(storage.path(folder))
    return Position(len(paths) - 1, paths[-1].stat().st_size) if paths else Position(0, 0)


def segments(folder: Path) -> list[Path]:
    """Return the files of a log, in order.

    Raises:
      ValueError: if one is missing.
    """
    paths = sorted(folder.glob("feedback-*.log"))
    for number, path in enumerate(paths):
        if path != _path(folder, number):
            raise ValueError(f"{_path(folder, number)} is missing though {path.name} is there; restore it from a copy")
    return paths


def _path(folder: Path, number: int) -> Path:
    return folder / f"feedback-{number:06d}.log"


def check(folder: Path, signals: Signals, sizes: dict[str, int] | None = None) -> None:
    """Check that a log has this version, and the signals and sizes wanted.

    Raises:
      ValueError: naming what differs.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{folder / MANIFEST} says {manifest}, this code has version {VERSION}; use the code that wrote the log"
        )
    if (found := tuple(manifest.get("signals", ()))) != signals.names:
        raise ValueError(
            f"{folder} has the signals {', '.join(found)}, not {', '.join(signals.names)}; name another log, or a "
            "ranker that was trained on the same signals"
        )
    for name, wanted in (sizes or {}).items():
        found = manifest["sizes"].get(name, wanted)
        if found != wanted:
            raise ValueError(
                f"{folder} is the log of rankers with {name}={found}, not {wanted}; name another log, or a ranker that "
                "was trained on the same kind of data"
            )


class OpenRequest:
    """A request of an open session, and the feedback on its slate."""

    __slots__ = ("answered", "context", "events", "feedback", "number", "videos")

    def __init__(self, number: int, videos: np.ndarray, context: np.ndarray, signals: Signals):
        self.number = number  # index among the user's requests
        self.videos = videos  # [k] ids, as shown
        self.context = context  # [Dx] of the request
        self.feedback = np.zeros((len(videos), len(signals)), np.float32)
        self.answered = False  # whether any feedback has arrived
        self.events: set[str] = set()


class UserLog:
    """The state of one user in a log: the history and requests of the open session, built from records in order.

    Attributes:
      signals: of the log.
      history_videos: [h ≤ H] ids, exposures before the session, oldest first.
      history_feedback: [h, S], their feedback.
      shown: the session's requests.
      requests: number of all requests of the user.
      profile: [Du], the last one received.
      time: time of the last record, ms.
      over: whether the user has left the session.
    """

    __slots__ = ("history_feedback", "history_videos", "over", "profile", "requests", "shown", "signals", "time")

    def __init__(self, signals: Signals) -> None:
        self.signals = signals
        self.history_videos = np.zeros(0, np.int64)
        self.history_feedback = np.zeros((0, len(signals)), np.float32)
        self.shown: list[OpenRequest] = []
        self.requests = 0
        self.profile: np.ndarray | None = None
        self.time = 0
        self.over = True

    def exposures(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (videos [e], feedback [e, S]) of history and session, oldest first, without unanswered requests."""
        answered = [s for s in self.shown if s.answered]
        videos = joined([self.history_videos, *(s.videos for s in answered)])
        return videos, np.concatenate([self.history_feedback, *(s.feedback for s in answered)])

    def apply(self, record: Record, history: int) -> OpenRequest | None:
        """Apply the next record of the user; a record that was applied before changes nothing.

        Args:
          record: the record.
          history: H, the number of exposures retained from before a session.

        Returns:
          The request that a feedback concerns, if the feedback is new; None for repeated feedback, feedback on a closed
          session, and requests.
        """
        if record["kind"] == "rank":
            if record["number"] < self.requests:
                return None  # applied before
            if record["start"]:
                given = record["history"]
                if given is None:
                    videos, feedback = self.exposures()
                else:
                    videos = unpack_ids(given["videos"])
                    feedback = np.frombuffer(given["feedback"], "<f4").reshape(-1, len(self.signals))
                # copies, since views would retain the whole previous session
                self.history_videos = videos[max(len(videos) - history, 0) :].copy()
                self.history_feedback = feedback[max(len(videos) - history, 0) :].copy()
                self.shown, self.over = [], False
            candidates = unpack_ids(record["candidates"])
            videos, context = candidates[np.frombuffer(record["slate"], "<u2")], np.frombuffer(record["context"], "<f4")
            self.shown.append(OpenRequest(record["number"], videos, context, self.signals))
            self.requests = record["number"] + 1
            self.profile = np.frombuffer(record["profile"], "<f4")
            self.time = record["time"]
            return None
        shown = self.request(int(record["request"].rpartition("-")[2]))
        if shown is None or record["event"] in shown.events:
            return None
        shown.events.add(record["event"])
        shown.answered = True
        place = {video: i for i, video in enumerate(shown.videos.tolist())}
        feedback = np.frombuffer(record["feedback"], "<f4").reshape(-1, len(self.signals))
        values = list(self.signals.of_kind("value"))
        for video, now in zip(unpack_ids(record["videos"]).tolist(), feedback, strict=True):
            known = shown.feedback[place[video]]
            last = np.where(now[values] != 0.0, now[values], known[values])
            np.maximum(known, now, out=known)
            known[values] = last
        self.over |= record["left"]
        self.time = record["time"]
        return shown

    def request(self, number: int) -> OpenRequest | None:
        """Return the request with this number if it belongs to the last session."""
        place = number - self.shown[0].number if self.shown else -1
        return self.shown[place] if 0 <= place < len(self.shown) else None


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate ids of one type; an empty part may have the other."""
    return np.concatenate([part for part in parts if len(part)] or [np.zeros(0, np.int64)])


def request_id(user: int | str, number: int) -> str:
    return f"{user}-{number}"
