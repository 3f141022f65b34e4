"""Copies of remote files on this machine, for code that needs a disk: memory maps, SQLite, event files."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmrf_jax.io import files, storage
from mmrf_jax.io.progress import say
from mmrf_jax.io.storage import RemotePath

#: Seconds between two copies of what a `Mirror` has.
EVERY = 60.0
_AT_ONCE = 8  # files
_SAID = 2**30  # bytes from which a copy is announced


@functools.cache
def _folder(process: int) -> Path:
    """Return this process's folder of copies, which is removed when it ends."""
    made = Path(tempfile.mkdtemp(prefix="mmrf_jax-"))

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(made, ignore_errors=True)

    atexit.register(remove)
    return made


def scratch(name: str) -> Path:
    """Return a new folder of this process, which is removed when it ends."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_folder(os.getpid())))


_known: dict[str, tuple[object, Path]] = {}  # address -> its state when it was copied, its copy


def local(path: Path) -> Path:
    """Return a file or folder that can be read on this machine: the path itself, or a copy of what an address holds.

    A copy stays until the process ends, and is made again if the address holds something else by then. Its files have
    times of modification that change with their contents.

    Raises:
      FileNotFoundError: if the address holds nothing.
    """
    if not isinstance(path, RemotePath):
        return path
    one = path.is_file()
    if not one and not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    state = {path.name: path.stat()} if one else {name: storage.about(info) for name, info in path.find().items()}
    if (known := _known.get(str(path))) and known[0] == state:
        return known[1]
    into = scratch("copy") / path.name
    _fetch(path, into, state, one)
    _known[str(path)] = state, into
    return into


def origin(path: str | os.PathLike) -> str:
    """Return the address of what a path is a copy of, else the absolute path: the same in every process."""
    found = os.path.abspath(path)
    for address, (_, copy) in list(_known.items()):
        if found == str(copy) or found.startswith(f"{copy}{os.sep}"):
            return address + found.removeprefix(str(copy))
    return found


def _fetch(path: RemotePath, into: Path, state: dict[str, Any], one: bool) -> None:
    """Copy an object, or the objects below a folder, with times of modification that change with their contents."""
    size = sum(about.st_size for about in state.values())
    if size >= _SAID:
        say(f"copying {path} to this machine, {size / 2**30:.1f} GiB")

    def copy(name: str) -> None:
        source, target = (path, into) if one else (path / name, into / name)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.download(target)
        os.utime(target, ns=(state[name].st_mtime_ns, state[name].st_mtime_ns))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(copy, state))


@contextlib.contextmanager
def built(target: Path, inside: str = "") -> Iterator[Path]:
    """Yield the folder in which to build something that a killed process resumes.

    For an address this is a folder of this machine that a kill leaves, and the next process finds. At the end what was
    built is copied; if the address has it already, the folder is a copy of it.

    Args:
      target: where it belongs.
      inside: the part of it that is built now, complete or not at all.
    """
    if not isinstance(target, RemotePath):
        yield target
        return
    if (done := target / inside).exists():
        _fetch(done, (root := scratch("built")) / inside, {n: storage.about(i) for n, i in done.find().items()}, False)
        yield root
        return
    root = cache("built", target)
    yield root
    if not done.exists():  # another process may have built the same meanwhile
        files.upload(root / inside, done)
    atexit.register(shutil.rmtree, root, ignore_errors=True)  # it is still read


def cache(kind: str, target: RemotePath) -> Path:
    """Return a folder of this machine for what belongs to an address; it outlasts the process."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    made = home / "mmrf_jax" / kind / hashlib.blake2b(str(target).encode(), digest_size=8).hexdigest()
    made.mkdir(parents=True, exist_ok=True)
    return made


class Mirror:
    """A folder of this machine for files that libraries append to, copied to an address every `EVERY` seconds.

    For a path of this machine the folder is that path, and nothing is copied.

    Args:
      target: where the files belong.
    """

    def __init__(self, target: Path):
        self._target = target
        self.folder = target
        if isinstance(target, RemotePath):
            (folder := scratch("mirror") / target.name).mkdir()
            self.folder = folder
        self._copied: dict[str, tuple[int, int]] = {}
        self._copying = threading.Lock()
        self._ended = threading.Event()
        if isinstance(target, RemotePath):
            threading.Thread(target=self._run, name="mirror", daemon=True).start()

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            try:
                self.sync()
            except OSError as error:
                say(f"not copied to {self._target}: {error}; will retry")

    def sync(self) -> None:
        """Copy the files that have changed."""
        if not isinstance(self._target, RemotePath):
            return
        with self._copying:
            for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
                about = path.stat()
                name, state = str(path.relative_to(self.folder)), (about.st_size, about.st_mtime_ns)
                if self._copied.get(name) != state:
                    (self._target / name).write_bytes(path.read_bytes())
                    self._copied[name] = state

    def close(self) -> None:
        """Copy the files a last time."""
        self._ended.set()
        self.sync()
