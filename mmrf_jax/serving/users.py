"""The service's users and new items, in an embedded store that can be rebuilt from the feedback log.

The log is authoritative. The store, an SQLite file, contains the users' state up to a log position or later. At its
start the service reads users on demand and applies the records after that position (records already applied to a user
change nothing). Without a store, or with a damaged one, it applies all records.
"""

from __future__ import annotations

import collections
import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgpack
import numpy as np

from mmrf_jax.data.readers import feedback_log
from mmrf_jax.data.readers.feedback_log import OpenRequest, Position, Record, UserLog
from mmrf_jax.io.progress import counted, say
from mmrf_jax.signals import Signals

_VERSION = 3
_AT_ONCE = 4_096  # users changed between two writes while a log is read
_A_FEW = 8  # users packed without yielding to other work


class UserStore:
    """Users by id; the most recent ones are in memory.

    One thread uses it, the one that appends to the log; another may `write` the rows that this one has `packed`.
    """

    def __init__(self, path: Path, log: Path, signals: Signals, history: int, in_memory: int = 100_000):
        """Open or create the store, and apply the log's records after its position.

        Args:
          path: the SQLite file.
          log: folder of the log.
          signals: of the log.
          history: H, the number of exposures retained from before a session.
          in_memory: number of users in memory, in addition to those changed since the last `flush`.

        Raises:
          ValueError: if the log is damaged.
        """
        self._path, self._signals, self._history, self._limit = path, signals, history, in_memory
        self._users: collections.OrderedDict[int | str, UserLog] = collections.OrderedDict()
        self._changed: set[int | str] = set()
        self._writing: set[int | str] = set()  # packed, but not yet in the file
        self._db, self.position = self._opened(log)
        #: Records of the items that no ranker had when they came, by id.
        stored = self._db.execute("SELECT id, record FROM items ORDER BY rowid")
        self.items: dict[int | str, Record] = {id_: msgpack.unpackb(record) for id_, record in stored}
        self._items: list[tuple[int | str, bytes]] = []  # those not yet in the file
        self._writer = self._connect()  # with one connection readers would wait for writes
        self._catch_up(log)

    def _opened(self, log: Path) -> tuple[sqlite3.Connection, Position]:
        try:
            db = self._connect()
            row = db.execute("SELECT segment, offset, history, clean FROM position").fetchone()
            if row is not None and not row[3] and db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("it is damaged")
            position = Position(0, 0) if row is None else Position(row[0], row[1])
            if row is not None and (row[2] != self._history or position > feedback_log.end(log)):
                raise sqlite3.DatabaseError("it is of another log or history")
        except sqlite3.DatabaseError as error:
            say(f"{self._path} cannot be used ({error}); it is made again from {log}")
            with contextlib.suppress(UnboundLocalError):
                db.close()
            for name in ("", "-wal", "-shm"):
                Path(f"{self._path}{name}").unlink(missing_ok=True)
            db, position = self._connect(), Position(0, 0)
        return db, position

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        # A power loss may cost the store, which is then rebuilt; a killed process costs nothing.
        db.execute("PRAGMA synchronous=OFF")
        if db.execute("PRAGMA user_version").fetchone()[0] not in (0, _VERSION):
            db.close()
            raise sqlite3.DatabaseError("it is of another version")
        db.execute(f"PRAGMA user_version={_VERSION}")
        db.execute("CREATE TABLE IF NOT EXISTS users (id PRIMARY KEY, state BLOB NOT NULL)")
        db.execute("CREATE TABLE IF NOT EXISTS items (id PRIMARY KEY, record BLOB NOT NULL)")
        db.execute(
            "CREATE TABLE IF NOT EXISTS position "
            "(one INTEGER PRIMARY KEY CHECK (one = 1), segment INTEGER, offset INTEGER, history INTEGER, clean INTEGER)"
        )
        return db

    def _catch_up(self, log: Path) -> None:
        last = feedback_log.end(log)
        if self.position == last:
            return
        report = counted(f"users of {log}", max(last.segment * feedback_log.SEGMENT_BYTES + last.offset, 1))
        for record, position in feedback_log.scan(log, self.position):
            self.apply(record)
            if len(self._changed) >= _AT_ONCE:
                self.flush(position)
                report(position.segment * feedback_log.SEGMENT_BYTES + position.offset)
            self.position = position
        self.flush(self.position)

    def get(self, user: int | str) -> UserLog:
        """Return a user, a new one if unknown; change it only through `apply`."""
        known = self._users.get(user)
        if known is None:
            row = self._db.execute("SELECT state FROM users WHERE id = ?", (user,)).fetchone()
            known = UserLog(self._signals) if row is None else unpack(row[0], self._signals)
            self._users[user] = known
            if len(self._users) > self._limit + len(self._changed) + len(self._writing):
                self._forget()
        else:
            self._users.move_to_end(user)
        return known

    def apply(self, record: Record) -> OpenRequest | None:
        """Apply a record that was appended to the log; see `UserLog.apply`."""
        if record["kind"] == "item":
            if record["id"] not in self.items:
                self.items[record["id"]] = record
                self._items.append((record["id"], msgpack.packb(record)))
            return None
        user = record["user"]
        changed = self.get(user).apply(record, self._history)
        self._changed.add(user)
        return changed

    def flush(self, position: Position) -> None:
        """Write all changes; `position` is the log's."""
        self.write([row for rows in self.packed() for row in rows], position)
        self.written(position)

    def packed(self) -> Iterator[list[tuple[int | str, bytes]]]:
        """Yield rows of the changed users for `write`, a few at a time; users may change in between."""
        self._writing, self._changed = self._changed | self._writing, set()  # with those of an aborted pass
        waiting = list(self._writing)
        for start in range(0, len(waiting), _A_FEW):
            yield [(user, pack(self._users[user])) for user in waiting[start : start + _A_FEW]]

    def write(self, rows: Sequence[tuple[int | str, bytes]], position: Position, clean: int = 0) -> None:
        """Write rows and new items to the file, with the log's position before the packing, in one transaction."""
        items = self._items[:]
        values = (1, position.segment, position.offset, self._history, clean)
        self._writer.execute("BEGIN")
        try:
            self._writer.executemany("INSERT OR REPLACE INTO users VALUES (?, ?)", rows)
            self._writer.executemany("INSERT OR IGNORE INTO items VALUES (?, ?)", items)
            self._writer.execute("INSERT OR REPLACE INTO position VALUES (?, ?, ?, ?, ?)", values)
            self._writer.execute("COMMIT")
            del self._items[: len(items)]
        except sqlite3.Error:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise

    def written(self, position: Position) -> None:
        """Mark the packed rows as written."""
        self._writing.clear()
        self.position = position
        self._forget()

    def _forget(self) -> None:
        for user in list(self._users):
            if len(self._users) <= self._limit:
                return
            if user not in self._changed and user not in self._writing:
                del self._users[user]

    @property
    def in_memory(self) -> int:
        return len(self._users)

    def close(self, position: Position) -> None:
        self.flush(position)
        self.write([], position, clean=1)
        self._writer.close()
        self._db.close()


def pack(known: UserLog) -> bytes:
    """Pack a user into bytes."""
    shown = [
        (
            s.number,
            feedback_log.pack_ids(s.videos),
            feedback_log.to_bytes(s.context, "<f4"),
            feedback_log.to_bytes(s.feedback, "<f4"),
            s.answered,
            sorted(s.events),
        )
        for s in known.shown
    ]
    profile = None if known.profile is None else feedback_log.to_bytes(known.profile, "<f4")
    history = feedback_log.pack_ids(known.history_videos), feedback_log.to_bytes(known.history_feedback, "<f4")
    return msgpack.packb((*history, shown, known.requests, profile, known.time, known.over))


def unpack(state: bytes, signals: Signals) -> UserLog:
    """Unpack the output of `pack`."""
    known, feedback = UserLog(signals), lambda x: np.frombuffer(x, "<f4").reshape(-1, len(signals))
    videos, answers, shown, known.requests, profile, known.time, known.over = msgpack.unpackb(state)
    known.history_videos, known.history_feedback = feedback_log.unpack_ids(videos), feedback(answers)
    known.profile = None if profile is None else np.frombuffer(profile, "<f4")
    for number, seen, context, got, answered, events in shown:
        request = OpenRequest(number, feedback_log.unpack_ids(seen), np.frombuffer(context, "<f4"), signals)
        request.feedback, request.answered, request.events = feedback(got).copy(), answered, set(events)
        known.shown.append(request)
    return known
