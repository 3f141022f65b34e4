"""The lock of a folder in object storage: a lease that its holder renews and that lapses when the holder has died.

The lock is the highest-numbered object of FOLDER/.lock/. A process takes it by creating the next number, which a
conditional write gives to one process only, and renews it by writing a new beat into it every `RENEW` seconds. A lock
is free if it says so, if its process has ended on this machine, or if its beat has not changed for `LEASE` seconds of
the observer's clock; clocks of different machines are never compared. The numbers only grow, so a process that was
suspended sees that it has lost the lock, and ends at once: it must write nothing more.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmrf_jax.io import storage
from mmrf_jax.io.progress import say
from mmrf_jax.io.storage import RemotePath

#: Seconds without a new beat after which a lock is free, and between two beats.
LEASE, RENEW = 60.0, 10.0
_KEPT = 2  # objects of a lock: the newest, and the one before


@contextlib.contextmanager
def held_by_lease(folder: RemotePath, patience: float = 0.0) -> Iterator[None]:
    """Lock a folder for this process; see `files.held`.

    If the last holder may have died on another machine, this waits up to `LEASE` seconds to see whether it lives.

    Raises:
      ValueError: if another process holds the folder, naming it.
      PermissionError: if nothing may be written there.
    """
    lock = _taken(folder, time.monotonic() + patience)
    ended = threading.Event()
    thread = threading.Thread(target=lock.renew, args=(ended,), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5.0)  # it may be asking a bucket that does not answer
        lock.release()


class _Lock:
    """A lock that this process has."""

    def __init__(self, folder: RemotePath, number: int):
        self._folder, self._number, self._token = folder, number, uuid.uuid4().hex
        since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self._about = {
            "holder": f"process {os.getpid()} on {socket.gethostname()}, since {since}",
            "machine": _machine(),
            "process": _process(os.getpid()),
            "token": self._token,
        }
        self._beat = 0
        self._pid = os.getpid()

    def create(self) -> None:
        """Create the lock's object.

        Raises:
          FileExistsError: if another process was first.
        """
        self._path(self._number).write_bytes(self._text(), create=True)

    def renew(self, ended: threading.Event) -> None:
        """Write a new beat every `RENEW` seconds until the event is set; end the process if the lock is lost."""
        while not ended.wait(RENEW):
            self._beat += 1
            try:
                if (newest := _newest(self._folder)) > self._number:
                    holder = _read(self._folder, newest).get("holder", "another process")
                    say(f"{self._folder} was taken over by {holder}: not renewed for {LEASE:.0f} s; this process ends")
                    os._exit(2)
                self._path(self._number).write_bytes(self._text())
            except OSError as error:
                say(f"the lock of {self._folder} could not be renewed ({error})")

    def release(self) -> None:
        """Mark the lock as free, and delete older numbers."""
        if os.getpid() != self._pid:  # a fork
            return
        with contextlib.suppress(OSError):
            self._path(self._number).write_bytes(json.dumps({"free": True}).encode())
            self.tidy()

    def tidy(self) -> None:
        """Delete the objects of earlier holders."""
        for number in _numbers(self._folder):
            if number <= self._number - _KEPT:
                self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> RemotePath:
        return self._folder / storage.LOCKS / f"{number:08d}"

    def _text(self) -> bytes:
        return json.dumps(self._about | {"beat": self._beat}).encode()


def _taken(folder: RemotePath, end: float) -> _Lock:
    """Return the lock of a folder, once this process has it."""
    while True:
        newest = _newest(folder)
        before = _read(folder, newest) if newest else {"free": True}
        if not _free(folder, newest, before):
            if time.monotonic() < end:
                time.sleep(0.5)
                continue
            holder = before.get("holder", "a process that has just begun")
            raise ValueError(
                f"{folder} is used by another process: {holder}; wait for it, stop it, or use another folder"
            )
        lock = _Lock(folder, newest + 1)
        try:
            lock.create()
        except FileExistsError:
            continue
        if _newest(folder) == newest + 1:
            lock.tidy()
            return lock
        lock.release()  # numbers have gone on since this process looked


def _free(folder: RemotePath, number: int, seen: dict[str, Any]) -> bool:
    """Return whether a lock has no living holder; this may take `LEASE` seconds."""
    if seen.get("free"):
        return True
    if seen.get("process") and seen["machine"] == _machine():
        return _process(seen["process"][0]) != seen["process"]
    holder = seen.get("holder", "a process that has just begun")
    say(f"{folder} was in use by {holder}; waiting up to {LEASE:.0f} s to see whether it still is")
    end = time.monotonic() + LEASE
    while time.monotonic() < end:
        time.sleep(min(1.0, LEASE / 5))
        if _newest(folder) != number or (now := _read(folder, number)) != seen:
            return _newest(folder) == number and bool(now.get("free"))
    return True


def _newest(folder: RemotePath) -> int:
    return max(_numbers(folder), default=0)


def _numbers(folder: RemotePath) -> list[int]:
    """Return the numbers of a lock's objects; other objects there are probes (`files.check_writable`)."""
    return [int(name) for name in (folder / storage.LOCKS).names(every=True) if name.isdecimal()]


def _read(folder: RemotePath, number: int) -> dict[str, Any]:
    try:
        return json.loads((folder / storage.LOCKS / f"{number:08d}").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _machine() -> str:
    """Return what identifies this machine since its start, and the numbers of its processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino} {socket.gethostname()}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _process(number: int) -> list[int]:
    """Return what identifies a running process of this machine, [its number, its start].

    [] if it has ended, or if the system has no /proc.
    """
    try:
        state, *_, start = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[:20]
    except OSError:
        return []
    return [] if state == "Z" else [number, int(start)]
