"""Files and folders: paths as the user means them, a lock for each folder, and writing that is whole or absent.

Whatever is written here is there as a whole or not at all, whatever the moment at which the process is killed.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import math
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmrf_jax.io.progress import say

#: The file of a folder that `held` locks.
LOCK = "lock"
_PROJECT = Path(__file__).resolve().parents[2]


def shipped(name: str) -> str:
    """A file of the project, such as experiments/world.py, as it can be read from the current folder."""
    path = _PROJECT / name
    here = os.path.exists(name) and os.path.samefile(name, path)
    return name if here else str(path)


def user_path(text: str, name: str) -> Path:
    """The path that a user gave: `~` and `~user` are home folders, everything else means itself.

    Args:
      name: what the path was given as, such as "--out".

    Raises:
      ValueError: for what is no path on this machine, naming it.
    """
    if not text:
        raise ValueError(f"{name} is empty; name a path")
    if "://" in text:
        raise ValueError(f"{name}={text} is an address; name a path of this machine, such as where it is mounted")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={text!r} is not UTF-8; rename the file or folder") from error
    if "\0" in text:
        raise ValueError(f"{name}={text!r} holds a zero byte; name a path")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name}={text}: there is no such home folder; write the path without ~") from error


@contextlib.contextmanager
def held(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Makes this process the only one that holds the folder, which must exist.

    The kernel releases the lock when the process ends, whatever ends it. NFS passes the lock on to its server, so it
    holds between machines too; where it is mounted with local locks, it holds on each machine alone. Where the file
    system has no locks at all, that is said, and the folder is not protected.

    Args:
      patience: seconds to wait for another process.

    Raises:
      ValueError: where another process holds the folder, naming that process.
    """
    path, end = folder / LOCK, time.monotonic() + patience
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "a process that has just begun"
            file.close()
            if time.monotonic() < end:
                time.sleep(0.1)
                continue
            raise ValueError(
                f"{folder} is used by another process: {holder}; wait for it, stop it, or use another folder"
            ) from None
        except OSError as error:
            say(f"{folder} cannot be locked ({error.strerror}); make sure that no second process uses it")
        # A holder removes its file as it ends, so this may be the lock of a file that is no longer there.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    with file:
        file.truncate(0)
        since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes JSON atomically: keys sorted, NumPy and JAX numbers and arrays accepted, no NaN.

    Raises:
      ValueError: for a number that is not finite, naming its place such as `ab_test.mmrf.watch_time.mean`.
      TypeError: for a value that JSON has no form for, naming its place.
    """
    text = json.dumps(plain(obj), sort_keys=True, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replaces a file by a text, atomically and durably (written beside it, synchronised, renamed)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with tmp.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming itself
    finally:
        os.close(folder)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder beside `path` to fill, renamed to it at the end; nothing is left of it where that is not reached."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.incomplete-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def plain(obj: Any, place: str = "") -> Any:
    """The same value in Python's own types.

    Raises:
      ValueError, TypeError: as `write_json`.
    """
    if isinstance(obj, dict):
        return {str(key): plain(value, f"{place}.{key}" if place else str(key)) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [plain(value, f"{place}[{i}]") for i, value in enumerate(obj)]
    if obj is None or isinstance(obj, str | bool | int):
        return obj
    if not isinstance(obj, float):
        if not (hasattr(obj, "dtype") and hasattr(obj, "shape")):
            raise TypeError(
                f"{place or 'the value'} is a {type(obj).__name__}; JSON holds numbers, texts, lists and dicts"
            )
        return plain(np.asarray(obj).tolist(), place)
    if not math.isfinite(obj):
        raise ValueError(f"{place or 'the value'} is {obj}; a result must be finite, leave it out or find its cause")
    return obj
