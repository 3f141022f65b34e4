"""MovieLens: ratings of films, as in the folders of ml-1m (`ratings.dat`) and ml-25m or later (`ratings.csv`).

A row is a rated film; films that were seen and not rated are unknown, so requests and candidates are reconstructed.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.data.readers.frame import tables
from mmrf_jax.io import copies, storage
from mmrf_jax.schema import Schema
from mmrf_jax.signals import Signal

_COLUMNS = {
    "ratings": ("userId", "movieId", "rating", "timestamp"),
    "movies": ("movieId", "title", "genres"),
    "users": ("userId", "gender", "age", "occupation", "zip"),
}
_NUMBERS = ("userId", "movieId", "rating", "timestamp", "age")
LIKED = 4.0  # stars


def load(folder: str | Path, quiet: bool = False) -> SessionLog:
    """Load the ratings of a folder, with signals `like` (4 stars or more) and `rating`, the main one.

    Raises:
      ValueError: if the files are missing or have another layout.
    """
    root = copies.local(storage.path(folder))
    ratings = _read(root, "ratings").with_columns(like=pl.col("rating") >= LIKED)
    year = pl.col("title").str.extract(r"\((\d{4})\)\s*$").cast(pl.Int32)
    movies = _read(root, "movies").select("movieId", pl.col("genres").str.split("|"), year=year)
    users = _read(root, "users").drop("zip") if (root / "users.dat").exists() else None
    schema = Schema(
        user="userId",
        item="movieId",
        time="timestamp",
        signals=[Signal("like"), Signal("rating", kind="value")],
        main="rating",
        time_unit="s",
        tag="genres",
    )
    return SessionLog.from_frame(ratings, schema, items=movies, users=users, quiet=quiet)


def _read(folder: Path, name: str) -> pl.LazyFrame:
    names, path = _COLUMNS[name], folder / f"{name}.dat"
    if not path.exists():
        return tables.scan_table(folder / f"{name}.csv", name, names, needed={column: column for column in names})
    lines = pl.Series([line.split("::") for line in path.read_text("latin-1").splitlines() if line])
    frame = lines.list.to_struct(fields=names).struct.unnest()
    return frame.lazy().with_columns(pl.col([n for n in names if n in _NUMBERS]).cast(pl.Int64))
