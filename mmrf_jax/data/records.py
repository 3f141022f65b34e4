"""Session logs on disk: packed blocks of sessions, one block per array_record, and a JSON manifest.

A block is a 20-byte header (magic, version, sessions, requests, whether scores follow) and then the arrays of a
`Sessions`, one after another, little-endian, without padding. A `InputSpec` determines its sizes, so `np.frombuffer`
alone reads a block; array_record compresses it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.data.sessions import num_exposures, select_sessions
from mmrf_jax.io import copies, extras, files, storage

VERSION = 2
MANIFEST = "manifest.json"
SESSIONS_PER_RECORD = 256
SESSIONS_PER_FILE = 65536
_MAGIC = b"MMRS"
_HEADER = struct.Struct("<4sIIII")


def array_records() -> Any:
    """Return the module that reads and writes array_record files.

    Raises:
      MissingExtra: if it is not installed.
    """
    with extras.needed("data"):
        from array_record.python import array_record_module
    return array_record_module


def layout(spec: InputSpec) -> tuple[tuple[str, bool, str, tuple[int, ...]], ...]:
    """Return (field, one row per session?, dtype, shape of a row) in the order on disk."""
    s = len(spec.signals)
    return (
        ("user_id", True, "<i4", ()),
        ("date", True, "<i4", ()),
        ("profile", True, "<f4", (spec.profile,)),
        ("history_videos", True, "<i4", (spec.history,)),
        ("history_feedback", True, "<f4", (spec.history, s)),
        ("history_mask", True, "|b1", (spec.history,)),
        ("terminated", True, "|b1", ()),
        ("truncated", True, "|b1", ()),
        ("lengths", True, "<i4", ()),
        ("context", False, "<f4", (spec.context,)),
        ("candidates", False, "<i4", (spec.candidates,)),
        ("slate", False, "<i4", (spec.slate,)),
        ("feedback", False, "<f4", (spec.slate, s)),
        ("log_propensity", False, "<f4", ()),
        ("scores", False, "<f4", (spec.candidates,)),
    )


def pack_sessions(log: Sessions, spec: InputSpec) -> bytes:
    """Pack a block of sessions into bytes; the shapes of `log` must match `spec`."""
    scored = log.scores is not None
    parts = [_HEADER.pack(_MAGIC, VERSION, log.num_sessions, log.num_requests, int(scored))]
    for name, _, dtype, _ in layout(spec):
        if name == "scores" and not scored:
            continue
        array = np.diff(log.offsets) if name == "lengths" else getattr(log, name)
        parts.append(np.ascontiguousarray(array, dtype).tobytes())
    return b"".join(parts)


def unpack_sessions(blocks: Sequence[bytes | np.ndarray], spec: InputSpec) -> Sessions:
    """Unpack several blocks into one log, in the order of the blocks.

    Raises:
      ValueError: for bytes that are not a block, were written by another version, or do not fit the spec.
    """
    headers = []
    for i, block in enumerate(blocks):
        if len(block) < _HEADER.size:
            raise ValueError(f"session block {i} has {len(block)} bytes, a header has {_HEADER.size}; rebuild the log")
        magic, version, n, r, scored = _HEADER.unpack_from(memoryview(block))  # type: ignore[arg-type]
        if magic != _MAGIC or version != VERSION:
            raise ValueError(
                f"session block {i} is {magic!r} version {version}, not {_MAGIC!r} {VERSION}; rebuild the log"
            )
        headers.append((n, r, scored))
    all_scored = [scored for n, _, scored in headers if n]
    if any(all_scored) and not all(all_scored):
        raise ValueError(
            f"{sum(all_scored)} of {len(all_scored)} session blocks hold scores; write all or none with them"
        )
    keep_scores = bool(all_scored) and all(all_scored)
    sizes = np.array(headers, np.int64).reshape(-1, 3)
    n_total, r_total = int(sizes[:, 0].sum()), int(sizes[:, 1].sum())

    fields = layout(spec)
    arrays = {
        name: np.empty((n_total if per_session else r_total, *shape), dtype)
        for name, per_session, dtype, shape in fields
        if name != "scores" or keep_scores
    }
    n_at = r_at = 0
    for i, (block, (n, r, scored)) in enumerate(zip(blocks, headers, strict=True)):
        position = _HEADER.size
        for name, per_session, dtype, shape in fields:
            if name == "scores" and not scored:
                continue
            rows, at = (n, n_at) if per_session else (r, r_at)
            count = rows * int(np.prod(shape, dtype=np.int64))
            size = count * np.dtype(dtype).itemsize
            if position + size > len(block):
                raise ValueError(
                    f"session block {i} has {len(block)} bytes, {name!r} would end at {position + size}; "
                    "it is damaged or was written with another spec: rebuild the log"
                )
            if name in arrays:
                arrays[name][at : at + rows] = np.frombuffer(block, dtype, count, position).reshape(rows, *shape)
            position += size
        if position != len(block):
            raise ValueError(f"session block {i} has {len(block)} bytes, the spec asks for {position}; rebuild the log")
        n_at, r_at = n_at + n, r_at + r
    offsets = np.concatenate([[0], np.cumsum(arrays.pop("lengths"), dtype=np.int64)])
    return Sessions(offsets=offsets, scores=arrays.pop("scores", None), **arrays)


def packed_blocks(log: Sessions, spec: InputSpec, sessions_per_record: int = SESSIONS_PER_RECORD) -> Iterator[bytes]:
    """Pack a log block by block; an empty log gives one empty block."""
    for start in range(0, max(log.num_sessions, 1), sessions_per_record):
        yield pack_sessions(
            select_sessions(log, np.arange(start, min(start + sessions_per_record, log.num_sessions))), spec
        )


def write_log(
    log: Sessions, directory: str | os.PathLike, spec: InputSpec, origin: dict[str, Any] | None = None
) -> None:
    """Write a log as `directory`/sessions-*.array_record and a manifest; the directory appears atomically.

    Args:
      log: the sessions.
      directory: folder to create.
      spec: spec of the log.
      origin: description of how the log was made, so that `read_log` can reject a log of another world.

    Raises:
      FileExistsError: if the directory exists.
      ValueError: if the log does not fit the spec or a request exposed no video.
    """
    directory = storage.path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory} exists; remove it or write the log to another directory")
    log.validate(spec)
    empty = int((~(log.slate >= 0).any(1)).sum())
    if empty:
        raise ValueError(f"{empty} of {log.num_requests} requests exposed no video; leave them out of the log")
    with files.new_folder(directory) as folder:
        parts = []
        starts = range(0, max(log.num_sessions, 1), SESSIONS_PER_FILE)
        for i, start in enumerate(starts):
            part = select_sessions(log, np.arange(start, min(start + SESSIONS_PER_FILE, log.num_sessions)))
            name = f"sessions-{i:05d}-of-{len(starts):05d}.array_record"
            writer = array_records().ArrayRecordWriter(str(folder / name), "group_size:1")
            for block in packed_blocks(part, spec):
                writer.write(block)
            writer.close()
            parts.append({"name": name, "sessions": part.num_sessions, "requests": part.num_requests})
        write_manifest(folder, spec, parts, num_exposures(log), log.scores is not None, origin)


def write_manifest(
    folder: pathlib.Path,
    spec: InputSpec,
    parts: Sequence[dict[str, Any]],
    exposures: int,
    scores: bool,
    origin: dict[str, Any] | None = None,
) -> None:
    """Write the manifest of a folder of array_record files.

    Args:
      folder: the folder.
      spec: of the log.
      parts: `name`, `sessions` and `requests` of each file, in which all blocks but the last are full.
      exposures: number of items shown.
      scores: whether blocks hold scores.
      origin: see `write_log`.
    """
    manifest = {
        "version": VERSION,
        "spec": dataclasses.asdict(spec),
        "origin": origin,
        "sessions": sum(part["sessions"] for part in parts),
        "requests": sum(part["requests"] for part in parts),
        "exposures": exposures,
        "scores": scores,
        "files": list(parts),
    }
    with open(folder / MANIFEST, "w") as f:
        json.dump(manifest, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


class Blocks:
    """The blocks of sessions in a folder of `write_log`, read on demand (implements `data.stream.Blocks`)."""

    def __init__(
        self, directory: str | os.PathLike, spec: InputSpec | None = None, origin: dict[str, Any] | None = None
    ):
        """Open the log and check its manifest.

        Args:
          directory: the folder of the log.
          spec: spec that the reader expects; None accepts any.
          origin: origin that the reader expects; None accepts any.

        Raises:
          FileNotFoundError: if there is no manifest, or a file named in it is missing.
          ValueError: for another version, spec or origin.
        """
        self._directory = storage.path(directory)
        if not (self._directory / MANIFEST).exists():
            raise FileNotFoundError(f"{self._directory / MANIFEST} does not exist; name a folder that collect wrote")
        try:
            manifest = json.loads((self._directory / MANIFEST).read_text())
            if manifest["version"] != VERSION:
                raise ValueError(f"log version {manifest['version']}, this code reads {VERSION}")
            self.spec, made_by = InputSpec.from_dict(manifest["spec"]), manifest["origin"]
            self._files = [(entry["name"], int(entry["sessions"])) for entry in manifest["files"]]
            self.total = (manifest["sessions"], manifest["requests"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._directory / MANIFEST} cannot be used ({error!r}); collect the log again"
            ) from error
        differing = {} if spec is None else self.spec.differing(spec)
        if made_by is not None and origin is not None:
            differing |= {n: (made_by.get(n), x) for n, x in origin.items() if not differing and made_by.get(n) != x}
        if differing:
            name, (found, wanted) = next(iter(differing.items()))
            raise ValueError(
                f"{self._directory} has {name}={found}, {wanted} is asked for; "
                f"collect it again or change the config ({', '.join(differing)} differ)"
            )
        for name, _ in self._files:
            if not (self._directory / name).exists():
                raise FileNotFoundError(
                    f"{self._directory / name} is missing though {MANIFEST} names it; collect the log again"
                )
        sizes = [np.full(-(-n // SESSIONS_PER_RECORD), SESSIONS_PER_RECORD) for _, n in self._files]
        for (_, n), blocks in zip(self._files, sizes, strict=True):
            blocks[-1:] -= len(blocks) * SESSIONS_PER_RECORD - n  # the last block of a file holds the rest
        self._first = np.cumsum([0, *map(len, sizes)])  # first block of each file
        self.sessions = np.concatenate(sizes).astype(np.int32)

    @functools.cached_property
    def _here(self) -> pathlib.Path:
        """The folder, or a copy on this machine: array_record reads files by memory maps."""
        return copies.local(self._directory)

    def read(self, blocks: Sequence[int] | np.ndarray) -> Sessions:
        """Read the sessions of some blocks, in the given order.

        Raises:
          IndexError: for a block that does not exist.
          ValueError: for a damaged file.
        """
        blocks = np.asarray(blocks, np.int64)
        if (wrong := blocks[(blocks < 0) | (blocks >= len(self.sessions))]).size:
            raise IndexError(
                f"block {wrong[0]} is not among the {len(self.sessions)} of {self._directory}; count them from 0"
            )
        file = np.searchsorted(self._first, blocks, side="right") - 1
        found: dict[int, bytes] = {}
        for number in np.unique(file):
            path, chosen = self._here / self._files[number][0], blocks[file == number]
            try:
                reader = array_records().ArrayRecordReader(str(path))
                found |= dict(zip(chosen.tolist(), reader.read((chosen - self._first[number]).tolist()), strict=True))
                reader.close()
            except Exception as error:  # the C++ reader raises several kinds
                raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}); collect the log again") from error
        return unpack_sessions([found[block] for block in blocks.tolist()], self.spec)


def read_log(
    directory: str | os.PathLike, spec: InputSpec | None = None, origin: dict[str, Any] | None = None
) -> tuple[Sessions, InputSpec]:
    """Read a whole log written by `write_log`.

    Raises:
      FileNotFoundError, ValueError: as `Blocks`, and for a log that does not match its manifest.
    """
    blocks = Blocks(directory, spec, origin)
    log = blocks.read(np.arange(len(blocks.sessions)))
    if (log.num_sessions, log.num_requests) != blocks.total:
        raise ValueError(
            f"{directory} holds {log.num_sessions} sessions, its manifest says {blocks.total[0]}; collect it anew"
        )
    return log, blocks.spec
