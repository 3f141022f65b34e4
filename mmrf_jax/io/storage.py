"""Object storage behind the verbs of `pathlib.Path`: `gs://`, `s3://` and every other protocol of fsspec.

`path` gives a `pathlib.Path` for a path of this machine and a `RemotePath` for an address, and all code works with
either. An object appears whole or not at all. Folders exist while they hold an object. What a rename gives on a disk
is an object `INCOMPLETE` here: while a folder holds it, it counts as absent (`files.new_folder`).

A bucket that answers with 429, 5xx or nothing is asked again, with growing pauses, for `PATIENCE` seconds; one line
says so. A missing permission is an error at once.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import io
import json
import os
import posixpath
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from mmrf_jax.io import extras
from mmrf_jax.io.progress import say

#: Seconds for which a bucket that does not answer is asked again.
PATIENCE = 900.0
#: While a folder holds this object, it is being written and counts as absent.
INCOMPLETE = ".incomplete"
#: Folder of a folder's lock (`lease`), which listings leave out.
LOCKS = ".lock"
_LONGEST_PAUSE = 20.0  # seconds
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
_PART = re.compile(r"(\d{4})-(\d{8})")  # name of a part of an appended file: its rewriting, its number
_MODULES = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "requests", "urllib3", "azure")

T = TypeVar("T")


def is_remote(given: str | os.PathLike) -> bool:
    """Return whether this is an address, not a path of this machine."""
    return "://" in os.fspath(given)


def path(given: str | os.PathLike) -> Path:
    """Return the path of a text: a `pathlib.Path`, or a `RemotePath`, which has the same methods."""
    if isinstance(given, RemotePath):
        return cast(Path, given)
    return cast(Path, RemotePath(os.fspath(given))) if is_remote(given) else Path(given)


class Unavailable(OSError):
    """A bucket answers with 429, 5xx or nothing; asking again may help."""


class RemotePath(os.PathLike):
    """An address in object storage, with the methods of `pathlib.Path` that this package uses.

    Args:
      address: PROTOCOL://BUCKET/KEY.
    """

    def __init__(self, address: str):
        self._protocol, _, key = address.partition("://")
        self.parts = tuple(part for part in key.split("/") if part not in ("", "."))

    def __fspath__(self) -> str:
        return f"{self._protocol}://{'/'.join(self.parts)}"

    __str__ = __fspath__

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: RemotePath) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str | os.PathLike) -> RemotePath:
        return RemotePath(f"{self}/{os.fspath(name)}")

    def joinpath(self, *names: str | os.PathLike) -> RemotePath:
        return RemotePath("/".join([str(self), *map(os.fspath, names)]))

    @property
    def name(self) -> str:
        return self.parts[-1] if self.parts else ""

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(f"{self._protocol}://{'/'.join(self.parts[:-1])}") if len(self.parts) > 1 else self

    @property
    def parents(self) -> tuple[RemotePath, ...]:
        """No folders: none has to be made or removed."""
        return ()

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def with_suffix(self, suffix: str) -> RemotePath:
        return self.with_name(self.stem + suffix)

    def relative_to(self, other: RemotePath) -> str:
        return str(self).removeprefix(f"{other}/")

    def resolve(self) -> RemotePath:
        """Return the address that an object `NAME.link` next to this one names, or this address (`link_to`)."""
        link = self.with_name(f"{self.name}.link")
        try:
            return self.parent / link._bytes().decode().strip()
        except FileNotFoundError:
            return self

    def absolute(self) -> RemotePath:
        return self

    def expanduser(self) -> RemotePath:
        return self

    def link_to(self, target: str) -> None:
        """Make this address stand for another in the same folder, atomically."""
        self.with_name(f"{self.name}.link").write_text(target)

    # Reading

    def exists(self) -> bool:
        return self._kind() is not None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "folder"

    def _kind(self) -> str | None:
        try:
            info = self.info()
        except FileNotFoundError:
            return None
        if info["type"] == "file" and not info["name"].endswith("/"):
            return "file"
        names = self.names()
        return None if not names else "file" if _PART.fullmatch(next(iter(names))) else "folder"

    def info(self) -> dict[str, Any]:
        """Return what fsspec knows of the object or folder."""
        return self.call(lambda fs: fs.info(str(self)))

    def stat(self) -> Any:
        """Return an object with `st_size`, and `st_mtime_ns`, which changes with the contents."""
        try:
            info = self.info()
            if info["type"] == "file":
                return about(info)
        except FileNotFoundError:
            pass
        if not (parts := self.appended()):
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        sizes = [(self / part).stat().st_size for part in parts]
        return SimpleNamespace(st_size=sum(sizes), st_mtime_ns=_stamp({"size": sizes}))

    def names(self, every: bool = False) -> dict[str, dict[str, Any]]:
        """Return what fsspec knows of each entry of this folder, sorted by name.

        Args:
          every: also locks, and what is incomplete.
        """
        try:
            listed = self.call(lambda fs: fs.ls(str(self), detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found = {info["name"].rstrip("/").rsplit("/", 1)[-1]: info for info in listed}
        key = "/".join(self.parts)
        found = {name: info for name, info in sorted(found.items()) if info["name"].strip("/") != key}
        if every:
            return found
        if INCOMPLETE in found:
            return {}
        return {name: info for name, info in found.items() if name != LOCKS}

    def iterdir(self) -> Iterator[RemotePath]:
        return iter([self / name for name in self.names()])

    def find(self, every: bool = False) -> dict[str, dict[str, Any]]:
        """Return what fsspec knows of each object below this folder, by its path in the folder; `every`: also locks."""
        start = "/".join(self.parts) + "/"
        listed = self.call(lambda fs: fs.find(str(self), detail=True))
        found = {info["name"].lstrip("/").removeprefix(start): info for info in listed.values()}
        return {name: info for name, info in sorted(found.items()) if every or LOCKS not in name.split("/")}

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        wanted = pattern.split("/")
        if len(wanted) == 1:
            return (self / name for name in self.names() if fnmatch.fnmatchcase(name, pattern))
        return (self / name for name in self.find() if _matches(name.split("/"), wanted))

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        return (self / name for name in self.find() if fnmatch.fnmatchcase(name.rsplit("/", 1)[-1], pattern))

    def read_bytes(self) -> bytes:
        """Return the contents: of an object, or of the parts of an appended file, joined."""
        try:
            return self._bytes()
        except FileNotFoundError:
            while parts := self.appended():
                try:
                    with ThreadPoolExecutor(16) as pool:
                        return b"".join(pool.map(lambda part: (self / part)._bytes(), parts))
                except FileNotFoundError:  # it was rewritten meanwhile
                    continue
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self)) from None

    def _bytes(self) -> bytes:
        return self.call(lambda fs: fs.cat_file(str(self)))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def appended(self) -> list[str]:
        """Return the names of the parts of an appended file, in order, of its newest rewriting; [] if it is none."""
        parts = [name for name in self.names() if _PART.fullmatch(name)]
        return [name for name in parts if name[:4] == parts[-1][:4]]

    def open(self, mode: str = "r", encoding: str = "utf-8", newline: str | None = None) -> Any:
        """Open the object; one that is written appears when it is closed."""
        if "r" in mode:
            data = io.BytesIO(self.read_bytes())
            return data if "b" in mode else io.TextIOWrapper(data, encoding=encoding, newline=newline)
        if "a" in mode:
            raise ValueError(f"{self} cannot be appended to; use `appending.Appender`")
        upload = _Upload(self, "x" in mode)
        return upload if "b" in mode else io.TextIOWrapper(upload, encoding=encoding, newline=newline)

    # Writing

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder exists while it holds an object."""

    def rmdir(self) -> None:
        """Do nothing."""

    def write_bytes(self, data: bytes, create: bool = False) -> None:
        """Write the object atomically.

        Args:
          create: only if there is none (`ifGenerationMatch=0`, `If-None-Match: *`).

        Raises:
          FileExistsError: with `create`, if there is one.
        """
        mode = "create" if create else "overwrite"
        try:
            self._written(lambda fs: fs.pipe_file(str(self), data, mode=mode))
        except FileExistsError:  # perhaps by this call, whose answer was lost
            if self._bytes() != data:
                raise

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def upload(self, file: Path) -> None:
        """Copy a file of this machine here; the object appears whole."""
        self._written(lambda fs: fs.put_file(str(file), str(self)))

    def _written(self, verb: Callable[[Any], object]) -> None:
        try:
            self.call(verb)
        except FileNotFoundError as error:
            bucket = RemotePath(f"{self._protocol}://{self.parts[0]}")
            raise FileNotFoundError(errno.ENOENT, "there is no such bucket; create it", str(bucket)) from error

    def download(self, file: Path) -> None:
        """Copy the object to a file of this machine."""
        self.call(lambda fs: fs.get_file(str(self), str(file)))

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object, or the parts of an appended file."""
        try:
            self.call(lambda fs: fs.rm_file(str(self)))
            return
        except FileNotFoundError:
            parts = self.appended()
            if not parts and not missing_ok:
                raise
        for part in reversed(parts):
            (self / part).unlink(missing_ok=True)

    def remove(self, *kept: str) -> None:
        """Delete all objects below this folder, its lock and those named excepted."""
        for name in self.find(every=True):
            if name not in kept and not name.startswith(f"{LOCKS}/"):
                (self / name).unlink(missing_ok=True)

    def call(self, verb: Callable[[Any], T]) -> T:
        """Return a function of the protocol's file system, asking again while the bucket does not answer.

        Raises:
          FileNotFoundError, FileExistsError, PermissionError, OSError: naming the address.
        """
        return retried(str(self), lambda: verb(filesystem(self._protocol)))


def _matches(names: list[str], wanted: list[str]) -> bool:
    if not wanted:
        return not names
    if wanted[0] == "**":
        return any(_matches(names[i:], wanted[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], wanted[0]) and _matches(names[1:], wanted[1:])


class _Upload(io.BytesIO):
    """Contents of an object that appears when it is closed."""

    def __init__(self, target: RemotePath, create: bool):
        super().__init__()
        self._target, self._create = target, create

    def __exit__(self, kind: Any, *details: Any) -> None:
        if kind is not None:
            super().close()  # half-written: nothing appears
        self.close()

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            self._target.write_bytes(data, self._create)


def about(info: dict[str, Any]) -> Any:
    """Return what `RemotePath.stat` says of an object, from what fsspec knows of it."""
    return SimpleNamespace(st_size=info["size"], st_mtime_ns=_stamp(info))


def _stamp(info: dict[str, Any]) -> int:
    """Return a number of nanoseconds that changes with the contents of an object, as a time of modification does."""
    told = [info.get(key) for key in ("size", "etag", "ETag", "md5Hash", "generation", "updated", "created", "mtime")]
    text = json.dumps(told, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


# ------------------------------------------------------------------------------------------------------- File systems

_settled = False


def filesystem(protocol: str) -> Any:
    """Return fsspec's file system of a protocol, without a cache of listings.

    Raises:
      MissingExtra: if its package is not installed.
      ValueError: for a protocol that fsspec does not know.
    """
    with extras.needed(_EXTRAS.get(protocol, "gcs")):
        import fsspec
    _settle(fsspec)
    try:
        return fsspec.filesystem(protocol)
    except ValueError as error:
        raise ValueError(f"{protocol}:// is no protocol of fsspec; use gs://, s3:// or a path") from error
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        fix = f"pip install 'mmrf_jax[{extra}]'" if extra else str(error)
        raise extras.MissingExtra(f"{protocol}:// needs a package that is not installed; {fix}") from error


def _settle(fsspec: Any) -> None:
    """Set the options of all file systems of this process, also of those that orbax and TFDS open."""
    global _settled
    if _settled:
        return
    _settled = True
    fresh = {"use_listings_cache": False}
    slow = {"connect_timeout": 20, "read_timeout": 60, "retries": {"max_attempts": 2}}
    fsspec.config.conf.setdefault("s3", {}).update(fresh | {"config_kwargs": slow})
    # Without it gcsfs asks for the kind of each bucket, by a second protocol that needs its own permission.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import aiohttp
        import gcsfs.core
    except ImportError:
        return
    # Its own retries are silent for half a minute, and then print a traceback; ours say one line.
    wrapped = gcsfs.core.GCSFileSystem._request
    gcsfs.core.GCSFileSystem._request = getattr(wrapped, "__wrapped__", wrapped)
    limits = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {}).update(fresh | {"requests_timeout": limits})


# ------------------------------------------------------------------------------------------------------------- Retries

_down: dict[str, float] = {}  # bucket -> since when it does not answer
_telling = threading.Lock()


def retried(address: str, call: Callable[[], T]) -> T:
    """Call a function again, with growing pauses, while its bucket does not answer.

    Raises:
      PermissionError, OSError: naming the address and the fix.
    """
    bucket = "/".join(address.split("/")[:3])
    pause, end = 0.5, None
    while True:
        try:
            found = call()
        except Exception as error:
            known = translated(address, error)
            if not isinstance(known, Unavailable):
                if known is error:
                    raise
                raise known from error
            now = time.monotonic()
            end = now + PATIENCE if end is None else end
            if now >= end:
                raise OSError(
                    errno.ETIMEDOUT, f"{bucket} has not answered for {_minutes(PATIENCE)} ({known}); try again later"
                ) from error
            _tell(bucket, f"{bucket} does not answer ({known}); trying again for {_minutes(PATIENCE)}", True)
        else:
            if bucket in _down:
                _tell(bucket, f"{bucket} answers again", False)
            return found
        time.sleep(pause * (0.5 + os.urandom(1)[0] / 512))  # so that processes do not ask at the same moments
        pause = min(2 * pause, _LONGEST_PAUSE)


def _tell(bucket: str, line: str, down: bool) -> None:
    """Say once that a bucket does not answer, and once that it does."""
    with _telling:
        if (bucket in _down) == down:
            return
        if down:
            _down[bucket] = time.monotonic()
        else:
            del _down[bucket]
    say(line)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"


def translated(address: str, error: Exception) -> Exception:
    """Return the error of a file system's library as one that says what to do; `Unavailable` if asking again helps."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError):
        return error
    code = _code(error)
    refused = PermissionError(
        errno.EACCES, f"no permission ({text}); docs/object-storage.md says which credentials and roles are needed"
    )
    refused.filename = address
    if isinstance(error, PermissionError) or code in (401, 403) or text.startswith("Forbidden"):
        return refused
    kind = type(error)
    if "Credentials" in kind.__name__ or kind.__name__ in ("RefreshError", "TokenRetrievalError"):
        return refused
    if code is not None and (code in (408, 429) or code >= 500):
        return Unavailable(f"{code} {text.split(',')[0]}" if str(code) not in text else text)
    if isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno in _BUSY):
        return Unavailable(text)
    if kind.__module__.split(".")[0] in _MODULES and code is None:
        return Unavailable(f"{kind.__name__}: {text}")
    if kind.__module__.split(".")[0] in _MODULES:
        return OSError(errno.EIO, text, address)
    return error


_BUSY = (errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT)


def _code(error: BaseException) -> int | None:
    """Return the HTTP status of an error, or of the error that caused it."""
    told: Any = getattr(error, "code", None) or getattr(error, "status", None)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        told = response.get("ResponseMetadata", {}).get("HTTPStatusCode", told)
    if isinstance(told, str) and told.isdigit():
        told = int(told)
    if isinstance(told, int):
        return told
    return _code(error.__cause__) if error.__cause__ is not None else None
