"""Object storage behind the methods of `pathlib.Path`: `gs://`, `s3://` and every other protocol of fsspec.

`path` gives a `pathlib.Path` for a path of this machine and a `RemotePath` for an address, and all code works with
either. An object appears whole or not at all. Folders exist while they hold an object. An object `INCOMPLETE`
replaces the rename of a disk: while a folder holds it, the folder counts as absent (`files.new_folder`).

Requests are retried while a bucket does not answer (`retries`); a missing permission is an error at once.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from mmrf_jax.io import retries

#: While a folder holds this object, it is being written and counts as absent.
INCOMPLETE = ".incomplete"
#: Folder of a folder's lock (`lease`), which listings leave out.
LOCKS = ".lock"
_PART = re.compile(r"(\d{4})-(\d{8})")  # name of a part of an appended file: its rewriting, its number

T = TypeVar("T")


def is_remote(given: str | os.PathLike) -> bool:
    """Return whether this is an address, not a path of this machine."""
    return "://" in os.fspath(given)


def path(given: str | os.PathLike) -> Path:
    """Return the path of a text: a `pathlib.Path`, or a `RemotePath`, which has the same methods."""
    if isinstance(given, RemotePath):
        return cast(Path, given)
    return cast(Path, RemotePath(os.fspath(given))) if is_remote(given) else Path(given)


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

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        return PurePosixPath(str(self).removeprefix(f"{other}/"))

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
        """Link this address to another in the same folder, atomically."""
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
          every: whether to include locks and incomplete entries.
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
        """Open the object; one that is written appears when it is closed, unless an error ends its `with`."""
        if "r" in mode:
            data = io.BytesIO(self.read_bytes())
            return data if "b" in mode else io.TextIOWrapper(data, encoding=encoding, newline=newline)
        if "a" in mode:
            raise ValueError(f"{self} cannot be appended to; use `appending.Appender`")
        upload = _Upload(self, "x" in mode)
        return upload if "b" in mode else _TextUpload(upload, encoding=encoding, newline=newline)

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
        """Copy the object, or the parts of an appended file, to a file of this machine."""
        if self.info()["type"] == "file":
            self.call(lambda fs: fs.get_file(str(self), str(file)))
        else:
            file.write_bytes(self.read_bytes())

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object, or the parts of an appended file."""
        try:
            if self.info()["type"] == "file":
                self._delete()
                return
        except FileNotFoundError:
            pass
        parts = self.appended()
        if not parts and not missing_ok:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        for part in reversed(parts):
            (self / part)._delete()

    def _delete(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.call(lambda fs: fs.rm_file(str(self)))

    def remove(self, *kept: str) -> None:
        """Delete all objects below this folder, its lock and those named excepted."""
        for name in self.find(every=True):
            if name not in kept and not name.startswith(f"{LOCKS}/"):
                (self / name)._delete()
        if not kept and not self.find(every=True):  # some protocols have folders that are left
            self.call(lambda fs: fs.rm(str(self), recursive=True) if fs.isdir(str(self)) else None)

    def call(self, verb: Callable[[Any], T]) -> T:
        """Return a function of the protocol's file system, with retries while the bucket does not answer.

        Raises:
          FileNotFoundError, FileExistsError, PermissionError, OSError: naming the address.
        """
        return retries.retried(str(self), lambda: verb(retries.filesystem(self._protocol)))


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


class _TextUpload(io.TextIOWrapper):
    """Text of an object that appears when it is closed."""

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self.flush()
        cast(_Upload, self.buffer).__exit__(*error)


def about(info: dict[str, Any]) -> Any:
    """Return what `RemotePath.stat` says of an object, from what fsspec knows of it."""
    return SimpleNamespace(st_size=info["size"], st_mtime_ns=_stamp(info))


def _stamp(info: dict[str, Any]) -> int:
    """Return a number of nanoseconds that changes with the contents of an object, as a time of modification does."""
    known = [info.get(key) for key in ("size", "etag", "ETag", "md5Hash", "generation", "updated", "created", "mtime")]
    text = json.dumps(known, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
