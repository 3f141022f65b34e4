"""Files that grow: appended to on a disk, in object storage written in numbered parts that readers join."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from mmrf_jax.io import files
from mmrf_jax.io.storage import RemotePath


class Appender:
    """Appends text to a file: on a disk each write, in object storage in numbered parts, which `read_bytes` joins.

    A part is written in the background when `SECONDS` have passed since the last, and by `sync`. After `PARTS` parts
    the file is rewritten as one. Only one process may append to a file at a time.

    Raises:
      OSError: if the file cannot be written, naming it; of a part that was written in the background, at the next call.
    """

    SECONDS, PARTS = 5.0, 500

    def __init__(self, path: Path):
        self._path = path
        self._remote = isinstance(path, RemotePath)
        if not self._remote:
            self._file = path.open("a", encoding="utf-8")
            return
        self._waiting: list[str] = []
        self._changing, self._writing = threading.Lock(), threading.Lock()
        parts = path.appended()  # type: ignore[attr-defined]
        self._rewriting, self._part = (int(parts[-1][:4]), int(parts[-1][5:]) + 1) if parts else (0, 0)
        self._failed: OSError | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="append", daemon=True).start()

    def write(self, text: str) -> None:
        if not self._remote:
            try:
                self._file.write(text)
                self._file.flush()
            except OSError as error:  # the original error does not name the file
                raise OSError(error.errno, error.strerror, self._file.name) from error
            return
        if self._failed is not None:
            raise self._failed
        with self._changing:
            self._waiting.append(text)

    def sync(self) -> None:
        """Wait until all of it is stored; on a disk `write` does so already, except for a power loss."""
        if self._remote:
            self._store()

    def close(self) -> None:
        """Store the rest, on a disk durably."""
        if self._remote:
            self._ended.set()
            self._store()
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _run(self) -> None:
        while not self._ended.wait(self.SECONDS):
            try:
                self._store()
            except OSError as error:
                self._failed = error
                return

    def _store(self) -> None:
        with self._writing:
            with self._changing:
                text, self._waiting = "".join(self._waiting), []
            if not text:
                return
            if self._part >= self.PARTS:
                rewrite(self._path, self._path.read_text() + text)
                self._rewriting, self._part = self._rewriting + 1, 1
                return
            part = f"{self._rewriting:04d}-{self._part:08d}"
            (self._path / part).write_bytes(text.encode(), create=True)  # type: ignore[call-arg]
            self._part += 1


def rewrite(path: Path, text: str) -> None:
    """Replace an appended file atomically; of the parts in object storage readers join the newest rewriting's only."""
    if not isinstance(path, RemotePath):
        files.write_text(path, text)
        return
    old, parts = list(path.names()), path.appended()
    number = int(parts[-1][:4]) + 1 if parts else 0
    (path / f"{number:04d}-{0:08d}").write_bytes(text.encode(), create=True)
    for name in old:
        (path / name).unlink(missing_ok=True)
