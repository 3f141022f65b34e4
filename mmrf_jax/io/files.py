"""Files and folders: user paths, folder locks, and atomic writes, on disks and in object storage (`storage`).

Every file and folder written here appears complete or not at all, whenever the process is killed.
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
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from mmrf_jax.io import extras, lease, retries, storage
from mmrf_jax.io.progress import say
from mmrf_jax.io.storage import RemotePath

#: The file that `held` locks in a folder.
LOCK = "lock"


def user_path(text: str, name: str) -> Path:
    """Convert a path given by the user: `~` and `~user` are home folders, everything else is literal.

    Args:
      text: the path, or an address such as gs://BUCKET/FOLDER.
      name: how the path was given, such as "--out".

    Returns:
      A `pathlib.Path`, or for an address a `storage.RemotePath`, which has its methods.

    Raises:
      ValueError: if it is no path, or an address that cannot be used; the message names it.
    """
    if not text:
        raise ValueError(f"{name} is empty; name a path")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={text!r} is not UTF-8; rename the file or folder") from error
    if "\0" in text:
        raise ValueError(f"{name}={text!r} holds a zero byte; name a path")
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if storage.is_remote(text):
        return _address(text, name)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name}={text}: there is no such home folder; write the path without ~") from error


def _address(text: str, name: str) -> Path:
    """Return the path of an address.

    Raises:
      ValueError: if it has no bucket, or fsspec does not know its protocol.
    """
    protocol, _, key = text.partition("://")
    if not protocol or not key.strip("/"):
        raise ValueError(f"{name}={text} has no bucket; write PROTOCOL://BUCKET/FOLDER")
    try:
        retries.filesystem(protocol)
    except (ValueError, extras.MissingExtra) as error:
        raise ValueError(f"{name}={text}: {error}") from error
    return storage.path(text)


@contextlib.contextmanager
def held(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Lock a folder, which must exist, for this process.

    The kernel releases the lock when the process ends for any reason. NFS passes the lock to its server, so it also
    holds between machines; with local locks it holds only within each machine. If the file system has no locks, a
    message says so and the folder is not protected. In object storage the lock is a lease (`lease.held_by_lease`).

    Args:
      folder: the folder.
      patience: seconds to wait for another process.

    Raises:
      ValueError: if another process holds the folder; the message names that process.
    """
    if isinstance(folder, RemotePath):
        with lease.held_by_lease(folder, patience):
            yield
        return
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
        # A holder removes its file when it ends, so this may be the lock of a deleted file.
        with contextlib.suppress(FileNotFoundError):
            if _same(file, path):
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
            with contextlib.suppress(FileNotFoundError):
                if _same(file, path):  # the folder may have been deleted, and be another process's by now
                    path.unlink()


def _same(file: IO, path: Path) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write JSON atomically: keys sorted, NumPy and JAX numbers and arrays accepted, no NaN.

    Raises:
      ValueError: for a number that is not finite, naming its location such as `ab_test.mmrf.watch_time.mean`.
      TypeError: for a value that JSON cannot represent, naming its location.
    """
    text = json.dumps(plain(obj), sort_keys=True, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name to an uncompressed .npz file, atomically, without pickling.

    Raises:
      TypeError: for an array of Python objects, naming it.
    """
    # Older versions of NumPy take `allow_pickle=False` of np.savez for an array of that name.
    if objects := [name for name, array in arrays.items() if np.asarray(array).dtype.hasobject]:
        raise TypeError(f"array {objects[0]!r} holds Python objects; convert it to numbers or text")
    with new_file(path) as temporary, temporary.open("wb") as file:
        named: dict[str, Any] = dict(arrays)
        np.savez(file, **named)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace a file with a text, atomically and durably (temporary file in the same folder, fsync, rename)."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file next to `path`; at the end it replaces `path`, durably. On an error it is removed."""
    path = storage.path(path)
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory() as made:
            yield (temporary := Path(made) / path.name)
            path.upload(temporary)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)  # makes the rename durable


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder next to `path` and rename it to `path` at the end; on an error it is removed.

    For an address it is on this machine. Its files are copied in the order in which they were written, so that the
    last, such as a manifest, says that all are there.
    """
    path = storage.path(path)
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory() as made:
            (temporary := Path(made) / path.name).mkdir()
            yield temporary
            upload(temporary, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.incomplete-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def link(source: str, target: str) -> None:
    """Hard-link a file, so that an interruption here loses nothing; copy it if links are not possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def upload(folder: Path, target: RemotePath) -> None:
    """Copy a folder of this machine to an address; until all of it is there, the address counts as absent.

    The files are copied in the order in which they were last written.

    Raises:
      FileExistsError: if the target exists.
      ValueError: if another process writes it.
    """
    with held(cast(Path, target)):
        if target.exists():
            raise FileExistsError(f"{target} exists; remove it or write to another folder")
        (target / storage.INCOMPLETE).write_bytes(b"")
        target.remove(storage.INCOMPLETE)  # what a killed process has left
        found = [path for path in folder.rglob("*") if path.is_file()]
        for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, str(path))):
            (target / path.relative_to(folder)).upload(path)
        (target / storage.INCOMPLETE).unlink()


def remove(folder: Path) -> None:
    """Delete a folder with all that is in it, if it exists."""
    if isinstance(folder, RemotePath):
        folder.remove()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def point(link: Path, target: Path) -> None:
    """Link a path to another in the same folder, atomically: a symbolic link, or its equivalent (`link_to`)."""
    name = str(target.relative_to(link.parent))
    if isinstance(link, RemotePath):
        link.link_to(name)
        return
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    os.replace(new, link)


def check_writable(folder: Path, name: str) -> None:
    """Refuse, before any work is done, a folder in object storage that cannot be written to.

    Raises:
      ValueError: naming how the folder was given, such as "--out".
    """
    if isinstance(folder, RemotePath):
        probe = folder / storage.LOCKS / f"probe-{uuid.uuid4().hex}"
        try:
            probe.write_bytes(b"")
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"{name}={folder} cannot be written: {error.strerror or error}") from error


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries into one with dotted names."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return out


def plain(obj: Any, place: str = "") -> Any:
    """Convert a value to plain Python types.

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
