"""Files that grow: appended to on a disk, in object storage written in numbered parts that readers join.

A part is GENERATION-NUMBER below the file's address. Rewriting a file writes the first part of the next generation,
whole, and then deletes the others: readers join the parts of the newest generation (`storage.RemotePath.read_bytes`).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from mmrf_jax.io import files
from mmrf_jax.io.storage import RemotePath

#: Parts after which a file should be rewritten as one, or another begun.
PARTS = 500


def open_to_append(path: Path, end: int) -> DiskFile | PartsFile:
    """Open a file to append bytes to, cut to its first `end` bytes; only one process may append to it at a time."""
    return PartsFile(path, end) if isinstance(path, RemotePath) else DiskFile(path, end)


class DiskFile:
    """A file on a disk: what is appended survives this process, what is synced a power loss."""

    full = False

    def __init__(self, path: Path, end: int):
        self._path, self._end = path, end
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._cut()
        self._new = True

    def _cut(self) -> None:
        os.ftruncate(self._file, self._end)
        os.lseek(self._file, self._end, os.SEEK_SET)

    def append(self, data: bytes) -> None:
        """Write bytes, all or none.

        Raises:
          OSError: if the disk is full.
        """
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError:
            self._cut()
            raise
        self._end += len(data)

    def sync(self) -> None:
        os.fdatasync(self._file)
        if self._new:  # makes the file itself durable
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            self._new = False

    def close(self) -> None:
        os.close(self._file)


class PartsFile:
    """A file in object storage: what is synced survives, as one part."""

    def __init__(self, path: RemotePath, end: int | None = None):
        self._path = path
        self._waiting: list[bytes] = []
        self._changing, self._writing = threading.Lock(), threading.Lock()
        if end is not None and path.exists() and len(whole := path.read_bytes()) > end:
            _removed(path, _renewed(path, whole[:end]))
        parts = path.appended()
        self._generation, self._part = (int(parts[-1][:4]), int(parts[-1][5:]) + 1) if parts else (0, 0)

    @property
    def full(self) -> bool:
        return self._part >= PARTS

    def append(self, data: bytes) -> None:
        with self._changing:
            self._waiting.append(data)

    def sync(self) -> None:
        """Store what was appended as a part; another thread may call it."""
        with self._writing:
            with self._changing:
                count, data = len(self._waiting), b"".join(self._waiting)
            if data:
                part = self._path / f"{self._generation:04d}-{self._part:08d}"
                part.write_bytes(data, create=True)
                self._part += 1
            with self._changing:
                del self._waiting[:count]

    def rewrite(self) -> None:
        """Store the file as one part."""
        self.sync()
        with self._writing:
            old = _renewed(self._path, self._path.read_bytes())
            self._generation, self._part = self._generation + 1, 1  # even if what follows fails
            _removed(self._path, old)

    def close(self) -> None:
        self.sync()


class Appender:
    """Appends lines: on a disk each at once, in object storage in the background every `SECONDS`, and by `sync`.

    Raises:
      OSError: if the file cannot be written, naming it; in object storage perhaps at a later call.
    """

    SECONDS = 5.0

    def __init__(self, path: Path):
        self._failed: OSError | None = None
        self._ended = threading.Event()
        self._parts: PartsFile | None = None
        if isinstance(path, RemotePath):
            self._parts = PartsFile(path)
            threading.Thread(target=self._run, name="append", daemon=True).start()
        else:
            self._file = path.open("a", encoding="utf-8")

    def write(self, text: str) -> None:
        if self._parts is not None:
            if self._failed is not None:
                raise self._failed
            self._parts.append(text.encode())
            return
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:  # the original error does not name the file
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def sync(self) -> None:
        """Wait until all of it survives this process."""
        if self._parts is not None:
            self._parts.sync()

    def close(self) -> None:
        """Store the rest, on a disk durably."""
        self._ended.set()
        if self._parts is not None:
            self._parts.close()
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _run(self) -> None:
        assert self._parts is not None
        while not self._ended.wait(self.SECONDS):
            try:
                self._parts.sync()
                if self._parts.full:
                    self._parts.rewrite()
            except OSError as error:
                self._failed = error
                return


def rewrite(path: Path, text: str) -> None:
    """Replace a file that is appended to, atomically; nothing may have it open."""
    if isinstance(path, RemotePath):
        _removed(path, _renewed(path, text.encode()))
    else:
        files.write_text(path, text)


def _renewed(path: RemotePath, data: bytes) -> list[str]:
    """Write the first part of the next generation; return the names of the older parts, which no reader needs."""
    old, parts = list(path.names()), path.appended()
    generation = int(parts[-1][:4]) + 1 if parts else 0
    (path / f"{generation:04d}-{0:08d}").write_bytes(data, create=True)
    return old


def _removed(path: RemotePath, names: list[str]) -> None:
    for name in names:
        (path / name).unlink(missing_ok=True)
