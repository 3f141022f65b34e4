"""Your own log as sessions: training, validation and test parts, with items, users, ids and a report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrf_jax import schema as schemas
from mmrf_jax import types
from mmrf_jax.data import records
from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.io import copies, extras, files, storage
from mmrf_jax.io.progress import say

VERSION = 1
#: The file that says what a folder holds.
ABOUT = "log.json"
_ARRAYS = ("author", "tag", "duration", "features", "embedding_id")
_VOCABULARIES = {"author": "author_text", "tag": "tag_text"}  # names of their arrays


@dataclasses.dataclass(frozen=True)
class SessionLog:
    """A log that `mmrf.train("logs", workdir=..., log=log)` learns from.

        log = mmrf.SessionLog.from_frame(df, schema, items=items_df)

    Attributes:
      schema: what its columns mean.
      spec: sizes and signals of the sessions.
      items: the item table, NumPy arrays [V, ...]; row 0 is an unknown item.
      item_ids: [V] ids of the items, strings or integers; the one of row 0 means nothing.
      user_ids: [U] likewise; `user_id` of the parts is the row.
      profiles: [U, Du] float32 features of the users, zeros in row 0.
      parts: {"train", "valid", "test": blocks of sessions on disk}; with `schema.random` also "random_train" and so on.
      encoders: {"items", "users", "context": the fitted encoders of feature columns, as plain values}.
      vocabularies: {"author", "tag": the texts [n] of their rows 1, 2, … in the items}.
      folder: what `save` wrote; it is removed with the log if it is temporary.
      report: what was assumed, what was left out, and counts, as plain values.
    """

    schema: schemas.Schema
    spec: InputSpec
    items: types.Items
    item_ids: np.ndarray
    user_ids: np.ndarray
    profiles: np.ndarray
    parts: Mapping[str, records.Blocks]
    encoders: Mapping[str, list[dict[str, Any]]]
    vocabularies: Mapping[str, np.ndarray]
    report: Mapping[str, Any]
    folder: Path
    _digest: str
    _temporary: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def from_frame(
        cls,
        log: Any,
        schema: schemas.Schema,
        items: Any = None,
        users: Any = None,
        candidates: Any = None,
        quiet: bool = False,
        folder: str | Path | None = None,
        engine: Any = None,
    ) -> SessionLog:
        """Read a log from a table with one row per shown item, and say on stderr what was assumed.

        Only user, item, time and one signal are needed. Requests, positions, candidates and propensities are used where
        the schema names them; otherwise requests are reconstructed and candidates sampled. Features, vocabularies and
        normalisers are fitted on the training part.

        Args:
          log: a pandas, polars or pyarrow table; or CSV, Parquet or Arrow files: a path, a glob, a folder, or several.
          schema: what the columns mean.
          items: table of items, whose other columns become features: numbers, flags, dates, categories, lists of
            categories, and vectors.
          users: table of users, likewise.
          candidates: table of the candidates, with the column `schema.request`, and a list in `schema.candidates` or
            one candidate a row in `schema.item`; None if the log has them, or nothing has.
          quiet: whether to say nothing.
          folder: a new folder for the prepared log, about as large as the table; None for a temporary one.
          engine: runs the tasks (`data.readers.engine.tasks`); None for processes of this machine.

        Raises:
          FileExistsError: if the folder exists.
          ValueError: for a table that does not fit the schema, naming the column, the value, its row and the fix.
          MissingExtra: without polars.
        """
        if not isinstance(schema, schemas.Schema):
            raise ValueError(f"schema is of type {type(schema).__name__}; give a mmrf_jax.Schema")
        with extras.needed("data"):
            from mmrf_jax.data.readers.frame import prepare
        temporary = tempfile.TemporaryDirectory(prefix="mmrf-log-") if folder is None else None
        folder = storage.path(folder or Path(temporary.name) / "log").absolute()  # type: ignore[union-attr]
        if folder.exists():
            raise FileExistsError(f"{folder} exists; remove it or name another folder")
        given = {"log": log, "items": items, "users": users, "candidates": candidates}
        with copies.built(folder.parent, folder.name) as parent:
            prepare.prepare_frame_log(given, schema, parent / folder.name, engine)
        made = dataclasses.replace(cls.open(folder), _temporary=temporary)
        return made if quiet else made.said()

    def said(self) -> SessionLog:
        """Say on stderr what was read and assumed; return the log."""
        for line in self.describe().splitlines():
            say(f"log: {line}")
        return self

    def part(self, name: str) -> Sessions:
        """Return the sessions of a part, read from disk: `train`, `valid`, `test`, or those of random rows."""
        return self.parts[name].read(np.arange(len(self.parts[name].sessions)))

    @property
    def train(self) -> Sessions:
        """The sessions of the training part."""
        return self.part("train")

    @property
    def valid(self) -> Sessions:
        """The sessions of the validation part; may be none."""
        return self.part("valid")

    @property
    def test(self) -> Sessions:
        """The sessions of the test part."""
        return self.part("test")

    def describe(self) -> str:
        """Return what was read, assumed and left out, as lines of text."""
        r = self.report
        lines = [f"{r['used']:,} of {r['rows']:,} rows are used, of {_counted(r['sizes'])}"]
        lines += [f"left out: {number:,} rows: {reason}" for reason, number in sorted(r["left_out"].items())]
        lines += [f"assumed: {text}" for text in r["assumed"]]
        for name, encoders in self.encoders.items():
            if encoders:
                lines.append(f"features of {name}: " + ", ".join(_described(**encoder) for encoder in encoders))
        for name in self.spec.signals.names:
            s = r["signals"][name]
            kind = f"{s['kind']}, {'more is better' if s['sign'] > 0 else 'more is worse'}"
            main = ", main" if name == r["main"] else ""
            lines.append(f"signal {name} ({kind}{main}): {s['positive']:,} positive, mean {s['mean']:.4g}")
        for name, s in r["splits"].items():
            when = "nothing" if s["from_to_utc"] is None else " to ".join(s["from_to_utc"]) + " UTC"
            lines.append(
                f"{name}: {when}; {s['users']:,} users, {s['sessions']:,} sessions, {s['requests']:,} requests, "
                f"{s['rows']:,} rows"
            )
        lines.append(f"requests are {r['requests']}, propensities {r['propensities']}")
        return "\n".join(lines)

    def digest(self) -> str:
        """Return 16 hex digits that differ if any session, item or id differs."""
        return self._digest

    def save(self, folder: str | Path) -> None:
        """Copy the log to a new folder, complete or not at all; see `open`. Files are linked where that is possible.

        Raises:
          FileExistsError: if the folder exists.
        """
        folder = storage.path(folder)
        if folder.exists():
            raise FileExistsError(f"{folder} exists; remove it or write to another folder")
        with files.new_folder(folder) as made:
            shutil.copytree(self.folder, made, copy_function=files.link, dirs_exist_ok=True)

    @classmethod
    def open(cls, folder: str | Path) -> SessionLog:
        """Open a log that `save` wrote; sessions are read when they are first used.

        Raises:
          ValueError: if the folder holds none, one of another version, or a damaged one.
        """
        folder = storage.path(folder)
        try:
            here = copies.local(folder)
            about = json.loads((here / ABOUT).read_text())
            if about["version"] != VERSION:
                raise ValueError(f"version {about['version']}, this code reads {VERSION}")
            parts = {name: records.Blocks(here / name) for name in about["report"]["splits"]}
            with np.load(here / "items.npz") as arrays, np.load(here / "users.npz") as users:
                item_ids, user_ids, profiles = arrays["id"], users["id"], users["profile"]
                vocabularies = {name: arrays[key] for name, key in _VOCABULARIES.items() if key in arrays.files}
                columns = {name: arrays[name] for name in _ARRAYS}
            digest = about["digest"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} is no log that can be read ({error}); read the tables again") from error
        items = types.Items(**columns, **about["items"])
        schema = schemas.of(about["schema"])
        return cls(
            schema=schema,
            spec=parts["train"].spec,
            items=items,
            item_ids=item_ids,
            user_ids=user_ids,
            profiles=profiles,
            parts=parts,
            encoders=about["encoders"],
            vocabularies=vocabularies,
            report=about["report"],
            folder=here,
            _digest=digest,
        )


def describe_log(log: Any, schema: schemas.Schema, items: Any = None, users: Any = None, candidates: Any = None) -> str:
    """Return what reading a log would assume and leave out, with counts; arguments as of `SessionLog.from_frame`."""
    return SessionLog.from_frame(log, schema, items, users, candidates, quiet=True).describe()


def log_key(tables: Mapping[str, Any], schema: schemas.Schema) -> str:
    """Return 16 hex digits that identify tables given by path, by names, sizes and times of change, and the schema.

    Args:
      tables: {name: a path, several, or None}; those in memory, or a part of them, get random digits.
      schema: of the log.
    """
    with extras.needed("data"):
        from mmrf_jax.data.readers.frame import tables as readers
    found: list[Any] = [repr(schema), VERSION]
    for name, table in tables.items():
        paths = [] if table is None else readers.files_of(table, name)
        if paths is None:
            return uuid.uuid4().hex[:16]
        stats = [(copies.origin(path), os.stat(path)) for path in paths]
        found.append((name, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]))
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def arrays_of(items: types.Items) -> dict[str, np.ndarray]:
    """Return the arrays of items by name."""
    return {name: np.asarray(getattr(items, name)) for name in _ARRAYS}


def write_log_files(log: SessionLog) -> None:
    """Write all but the sessions of a log to its folder."""
    texts = {_VOCABULARIES[name]: found for name, found in log.vocabularies.items()}
    files.write_arrays(log.folder / "items.npz", {"id": log.item_ids, **arrays_of(log.items), **texts})
    files.write_arrays(log.folder / "users.npz", {"id": log.user_ids, "profile": log.profiles})
    about = {"version": VERSION, "schema": log.schema.as_dict(), "digest": log.digest()}
    sizes = {name: getattr(log.items, name) for name in ("num_embeddings", "num_authors", "num_tags")}
    about |= {"items": sizes, "encoders": log.encoders, "report": log.report}
    files.write_json(log.folder / ABOUT, about)  # last: it says that the log is complete


def _described(name: str, kind: str, mean: Sequence[float], log: bool, vocabulary: Sequence[str], **_: Any) -> str:
    """Return a feature column in words."""
    sizes = {"vector": f" of {len(mean)}", "category": f" of {len(vocabulary)}", "categories": f" of {len(vocabulary)}"}
    return f"{name} ({kind}{sizes.get(kind, '')}{', as log1p' if log else ''})"


def _counted(sizes: Mapping[str, int]) -> str:
    named = {"items": "items", "users": "users", "item_features": "item features", "user_features": "user features"}
    found = [f"{sizes[name]:,} {text}" for name, text in named.items()]
    return ", ".join(found) + f"; up to {sizes['slate_size']} of {sizes['num_candidates']} candidates are shown"
