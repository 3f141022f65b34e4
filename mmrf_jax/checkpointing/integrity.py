"""Checksums of a checkpoint's files, to detect a truncated, missing or altered file before it is used.

Every step directory has `checksums.json`: the digest and size of each file and the dtype and shape of each leaf. Its
first line is the digest of the rest. It is written twice, each time by an atomic replacement:

* Before orbax commits the step (renames its temporary directory), over all files written so far. A committed step
  therefore always has its checksums, whenever the process is killed.
* After the commit (`seal`), to add the two small files that orbax writes during the commit. If the process is killed in
  between, these two files stay unchecked; no array is read from them.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator

from etils import epath

from mmrf_jax.checkpointing.leaves import Spec
from mmrf_jax.io import storage
from mmrf_jax.io.storage import RemotePath

CHECKSUMS = "checksums.json"
_MD5 = "md5:"  # before a digest that is not BLAKE2
#: Files that orbax writes during the commit, after the first checksums.
_LATE = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Damaged(Exception):
    """A checkpoint whose files differ from what was written; the message names the file and the difference."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of `checksums.json`."""

    step: int
    leaves: Spec
    files: dict[str, list]  # path in the step directory -> [digest (`_digest`), size in bytes]


def write(step_dir: epath.Path, step: int, leaves: Spec) -> None:
    """Compute and write atomically the checksums of every file of a step directory that orbax has finished writing."""
    files = {name: _digest(path) for name, path in _files(step_dir) if name not in (CHECKSUMS, *_LATE)}
    _store(step_dir, Manifest(step, leaves, files))


def seal(step_dir: epath.Path) -> None:
    """Add the files of the commit to the checksums without reading the others again. Idempotent.

    Raises:
      Damaged: if the checksums cannot be read.
    """
    manifest = load(step_dir)
    late = {name: _digest(step_dir / name) for name in _LATE if (step_dir / name).exists()}
    if late.keys() - manifest.files.keys():
        _store(step_dir, dataclasses.replace(manifest, files=late | manifest.files))


def load(step_dir: epath.Path) -> Manifest:
    """Read the checksums of a step.

    Raises:
      Damaged: if the checksums are missing or altered.
      OSError: if a bucket does not answer, or refuses.
    """
    try:
        digest, body = (step_dir / CHECKSUMS).read_bytes().split(b"\n", 1)
    except (OSError, ValueError) as error:
        if _unreachable(step_dir, error):
            raise
        raise Damaged(f"{CHECKSUMS} is missing or cut short") from error
    if hashlib.blake2b(body, digest_size=16).hexdigest().encode() != digest:
        raise Damaged(f"{CHECKSUMS} was altered")
    return Manifest(**json.loads(body))


def verify(step_dir: epath.Path) -> Manifest:
    """Read every file of a step and compare it with its checksum.

    Raises:
      Damaged: for the first file that is missing, of another size or altered.
      OSError: if a bucket does not answer, or refuses.
    """
    manifest = load(step_dir)
    if str(manifest.step) != step_dir.name:
        raise Damaged(f"{CHECKSUMS} is of step {manifest.step}")
    for name, (digest, size) in manifest.files.items():
        try:
            found, found_size = _digest(step_dir / name, digest.startswith(_MD5))
        except OSError as error:
            if _unreachable(step_dir, error):
                raise
            raise Damaged(f"file {name} is missing or unreadable ({error.strerror})") from error
        if found_size != size:
            raise Damaged(f"file {name} has {found_size} bytes instead of {size}")
        if found != digest:
            raise Damaged(f"file {name} was altered (its checksum differs)")
    return manifest


def _unreachable(step_dir: epath.Path, error: Exception) -> bool:
    """Return whether an error is a bucket's, and so says nothing about a step, which would be deleted as damaged."""
    return storage.is_remote(step_dir) and not isinstance(error, FileNotFoundError | ValueError)


def _files(folder: epath.Path, prefix: str = "") -> Iterator[tuple[str, epath.Path]]:
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name, path


def _digest(path: epath.Path, md5: bool | None = None) -> list:
    """Return the digest of a file, and its size in bytes.

    Args:
      md5: whether the digest is MD5, which a bucket knows of its objects, or BLAKE2; None for what needs no reading.
    """
    if storage.is_remote(path) and md5 is not False:
        known = RemotePath(os.fspath(path)).info()
        if known.get("md5Hash"):
            return [_MD5 + base64.b64decode(known["md5Hash"]).hex(), known["size"]]
    digest, size = hashlib.md5() if md5 else hashlib.blake2b(digest_size=16), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return [_MD5 * bool(md5) + digest.hexdigest(), size]


def _store(step_dir: epath.Path, manifest: Manifest) -> None:
    body = json.dumps(dataclasses.asdict(manifest), sort_keys=True).encode()
    text = hashlib.blake2b(body, digest_size=16).hexdigest().encode() + b"\n" + body
    if storage.is_remote(step_dir):
        (step_dir / CHECKSUMS).write_bytes(text)
        return
    tmp = step_dir / f"{CHECKSUMS}.tmp"
    tmp.write_bytes(text)
    tmp.replace(step_dir / CHECKSUMS)
