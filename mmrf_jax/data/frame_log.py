"""Your own log as sessions: training, validation and test parts, with items, users, ids and a report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrf_jax import schema as schemas
from mmrf_jax import types
from mmrf_jax.data import records
from mmrf_jax.data.session_log import InputSpec, SessionLog
from mmrf_jax.data.splits import SPLITS
from mmrf_jax.io import copies, extras, files, storage
from mmrf_jax.io.progress import say

VERSION = 1
_ABOUT = "log.json"


@dataclasses.dataclass(frozen=True)
class FrameLog:
    """A log that `mmrf.train("logs", workdir=..., log=log)` learns from.

        log = mmrf.SessionLog.from_frame(df, schema, items=items_df)

    Attributes:
      schema: what its columns mean.
      spec: sizes and signals of the sessions.
      items: the item table, NumPy arrays [V, ...]; row 0 is an unknown item.
      item_ids: [V] ids of the items, strings or integers; the one of row 0 means nothing.
      user_ids: [U] likewise; `user_id` of the parts is the row.
      profiles: [U, Du] float32 features of the users, zeros in row 0.
      parts: {"train", "valid", "test": sessions, in memory or blocks on disk}.
      encoders: {"items", "users": the fitted encoders of feature columns, as plain values}.
      report: what was assumed, what was left out, and counts, as plain values.
    """

    schema: schemas.Schema
    spec: InputSpec
    items: types.Items
    item_ids: np.ndarray
    user_ids: np.ndarray
    profiles: np.ndarray
    parts: Mapping[str, SessionLog | records.Blocks]
    encoders: Mapping[str, list[dict[str, Any]]]
    report: Mapping[str, Any]

    @classmethod
    def from_frame(
        cls,
        log: Any,
        schema: schemas.Schema,
        items: Any = None,
        users: Any = None,
        candidates: Any = None,
        quiet: bool = False,
    ) -> FrameLog:
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

        Raises:
          ValueError: for a table that does not fit the schema, naming the column, the value, its row and the fix.
          MissingExtra: without polars.
        """
        with extras.needed("data"):
            from mmrf_jax.data.readers.frame import build
        made = build.from_frame(log, schema, items, users, candidates)
        if not quiet:
            for line in made.describe().splitlines():
                say(f"log: {line}")
        return made

    def part(self, name: str) -> SessionLog:
        """Return the sessions of `train`, `valid` or `test`, read from disk if they are not in memory."""
        part = self.parts[name]
        return part if isinstance(part, SessionLog) else part.read(np.arange(len(part.sessions)))

    @property
    def train(self) -> SessionLog:
        """The sessions of the training part."""
        return self.part("train")

    @property
    def valid(self) -> SessionLog:
        """The sessions of the validation part; may be none."""
        return self.part("valid")

    @property
    def test(self) -> SessionLog:
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
        for name in SPLITS:
            s = r["splits"][name]
            when = "nothing" if s["from_to_utc"] is None else " to ".join(s["from_to_utc"]) + " UTC"
            lines.append(
                f"{name}: {when}; {s['users']:,} users, {s['sessions']:,} sessions, {s['requests']:,} requests, "
                f"{s['rows']:,} rows"
            )
        lines.append(f"requests are {r['requests']}, propensities {r['propensities']}")
        return "\n".join(lines)

    def digest(self) -> str:
        """Return 16 hex digits that differ if any session, item or id differs."""
        found = hashlib.sha256(repr(self.spec).encode())
        for ids in (self.item_ids, self.user_ids):
            found.update(np.ascontiguousarray(ids).tobytes())
        for array in (self.profiles, *_arrays(self.items).values()):
            found.update(np.ascontiguousarray(array).tobytes())
        for name in SPLITS:
            part = self.part(name)
            for field in dataclasses.fields(part):
                if (value := getattr(part, field.name)) is not None:
                    found.update(np.ascontiguousarray(value).tobytes())
        return found.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write the log to a new folder, complete or not at all; see `open`.

        Raises:
          FileExistsError: if the folder exists.
        """
        folder = storage.path(folder)
        if folder.exists():
            raise FileExistsError(f"{folder} exists; remove it or write to another folder")
        with files.new_folder(folder) as made:
            for name in SPLITS:
                records.write_log(self.part(name), made / name, self.spec)
            files.write_arrays(made / "items.npz", {"id": self.item_ids, **_arrays(self.items)})
            files.write_arrays(made / "users.npz", {"id": self.user_ids, "profile": self.profiles})
            about = {"version": VERSION, "schema": self.schema.as_dict(), "digest": self.digest()}
            sizes = {name: getattr(self.items, name) for name in ("num_embeddings", "num_authors", "num_tags")}
            about |= {"items": sizes, "encoders": self.encoders, "report": self.report}
            files.write_json(made / _ABOUT, about)

    @classmethod
    def open(cls, folder: str | Path) -> FrameLog:
        """Open a log that `save` wrote; sessions are read when they are first used.

        Raises:
          ValueError: if the folder holds none, one of another version, or a damaged one.
        """
        folder = storage.path(folder)
        try:
            here = copies.local(folder)
            about = json.loads((here / _ABOUT).read_text())
            if about["version"] != VERSION:
                raise ValueError(f"version {about['version']}, this code reads {VERSION}")
            parts = {name: records.Blocks(here / name) for name in SPLITS}
            with np.load(here / "items.npz") as arrays, np.load(here / "users.npz") as users:
                item_ids, user_ids, profiles = arrays["id"], users["id"], users["profile"]
                columns = {name: arrays[name] for name in arrays.files if name != "id"}
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} is no log that can be read ({error}); read the tables again") from error
        items = types.Items(**columns, **about["items"])
        schema = schemas.of(about["schema"])
        return cls(
            schema, parts["train"].spec, items, item_ids, user_ids, profiles, parts, about["encoders"], about["report"]
        )


def describe(log: Any, schema: schemas.Schema, items: Any = None, users: Any = None, candidates: Any = None) -> str:
    """Return what reading a log would assume and leave out, with counts; arguments as of `FrameLog.from_frame`."""
    return FrameLog.from_frame(log, schema, items, users, candidates, quiet=True).describe()


def _arrays(items: types.Items) -> dict[str, np.ndarray]:
    names = ("author", "tag", "duration", "features", "embedding_id")
    return {name: np.asarray(getattr(items, name)) for name in names}


def _described(name: str, kind: str, mean: Sequence[float], log: bool, vocabulary: Sequence[str], **_: Any) -> str:
    """Return a feature column in words."""
    sizes = {"vector": f" of {len(mean)}", "category": f" of {len(vocabulary)}", "categories": f" of {len(vocabulary)}"}
    return f"{name} ({kind}{sizes.get(kind, '')}{', as log1p' if log else ''})"


def _counted(sizes: Mapping[str, int]) -> str:
    named = {"items": "items", "users": "users", "item_features": "item features", "user_features": "user features"}
    found = [f"{sizes[name]:,} {text}" for name, text in named.items()]
    return ", ".join(found) + f"; up to {sizes['slate_size']} of {sizes['num_candidates']} candidates are shown"
