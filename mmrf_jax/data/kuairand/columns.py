"""The official file layout of KuaiRand-Pure, -1K and -27K: which files there are and which columns they hold.

Every reader returns a polars frame in which a cell that is no number is null; `clean` counts what cannot be used.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import polars as pl

#: Column of the log for each binary signal, in the order of `types.SIGNALS`; watch time is `play_time_ms`.
SIGNAL_COLUMNS = (
    "is_click",
    "long_view",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "is_profile_enter",
)
#: Log columns that must be there, with the narrowest type that holds them.
LOG_TYPES = {
    "user_id": pl.Int32,
    "video_id": pl.Int32,
    "date": pl.Int32,
    "time_ms": pl.Int64,
    **dict.fromkeys(SIGNAL_COLUMNS, pl.Int8),
    "play_time_ms": pl.Int32,
    "duration_ms": pl.Int32,
    "is_rand": pl.Int8,
    "tab": pl.Int16,
}
#: Log columns that only serve to tell exact duplicates from rows that differ.
EXTRA_LOG_TYPES = {"hourmin": pl.Int32, "profile_stay_time": pl.Int64, "comment_stay_time": pl.Int64}
USER_FLAGS = ("is_lowactive_period", "is_live_streamer", "is_video_author")
USER_COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
USER_CODES = tuple(f"onehot_feat{i}" for i in range(18))
USER_COLUMNS = ("user_id", "user_active_degree", *USER_FLAGS, *USER_COUNTS, *USER_CODES)
VIDEO_COLUMNS = ("video_id", "author_id", "video_type", "upload_dt", "upload_type", "video_duration", "tag")

_NAME = re.compile(
    r"(log_standard|log_random|user_features|video_features_basic)(?:_\d_\d\d_to_\d_\d\d)?_(pure|1k|27k)(_part\d+)?\.csv"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of one KuaiRand release; `logs` are standard and random (`is_rand` tells rows apart)."""

    variant: str  # "pure", "1k" or "27k"
    logs: tuple[pathlib.Path, ...]
    users: tuple[pathlib.Path, ...]
    videos: tuple[pathlib.Path, ...]

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        return (*self.logs, *self.users, *self.videos)


def find_source(directory: str | os.PathLike) -> Source:
    """Finds the official files in `directory` or `directory`/data.

    Raises:
      FileNotFoundError: for a missing directory, no log file at all, or no user or basic video features.
      ValueError: where files of two releases lie together.
    """
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"KuaiRand directory {root} does not exist; name the folder of the unpacked download")
    folder = root / "data" if (root / "data").is_dir() else root
    found: dict[str, list[pathlib.Path]] = {}
    variants = set()
    for path in sorted(folder.glob("*.csv")):
        if match := _NAME.fullmatch(path.name):
            found.setdefault(match[1], []).append(path)
            variants.add(match[2])
    logs = (*found.get("log_standard", ()), *found.get("log_random", ()))
    if not logs:
        raise FileNotFoundError(
            f"{folder} holds no log_standard_*.csv or log_random_*.csv of KuaiRand; name the unpacked download"
        )
    if len(variants) > 1:
        raise ValueError(
            f"{folder} holds files of {' and '.join(sorted(variants))}; keep each release in its own folder"
        )
    variant = variants.pop()
    for kind in ("user_features", "video_features_basic"):
        if kind not in found:
            raise FileNotFoundError(
                f"{folder / f'{kind}_{variant}.csv'} is missing; copy it from the KuaiRand download"
            )
    return Source(variant, logs, tuple(found["user_features"]), tuple(found["video_features_basic"]))


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The lines of a file that begin in its bytes `start` … `end` − 1."""

    path: pathlib.Path
    start: int
    end: int

    def read(self) -> bytes:
        with open(self.path, "rb") as f:
            f.seek(max(self.start - 1, 0))
            if self.start:
                f.readline()  # the rest of a line that began before
            rest = self.end - f.tell()
            return f.read(rest - 1) + f.readline() if rest > 0 else b""


def whole(path: pathlib.Path) -> Chunk:
    """All lines of a CSV file but its header."""
    return Chunk(path, len(_first_line(path)), path.stat().st_size)


def chunks(path: pathlib.Path, size: int) -> list[Chunk]:
    """The lines of a CSV file but its header, in chunks of about `size` bytes; one at least."""
    all_lines = whole(path)
    first, end = all_lines.start, all_lines.end
    edges = [first, *range(first + size, end - size // 2, size), end]
    return [Chunk(path, a, b) for a, b in itertools.pairwise(edges)]


def check(source: Source) -> None:
    """Raises ValueError for a file that is empty or lacks a column."""
    for paths, needed in (
        (source.logs, LOG_TYPES),
        (source.users, USER_COLUMNS),
        (source.videos, VIDEO_COLUMNS),
    ):
        for path in paths:
            _header(path, needed)


def read_log(chunk: Chunk) -> pl.DataFrame:
    """Lines of a log file: the columns of `LOG_TYPES` and `EXTRA_LOG_TYPES` (zeros where the file lacks one of these).

    A cell that is no whole number in its column's range is null; so are the cells that a short line lacks, and the
    time of a line with too many.

    Raises:
      ValueError: for an empty file or a missing column.
    """
    header = _header(chunk.path, LOG_TYPES)
    kept = {name: kind for name, kind in {**LOG_TYPES, **EXTRA_LOG_TYPES}.items() if name in header}
    zeros = [pl.lit(0, dtype=kind).alias(name) for name, kind in EXTRA_LOG_TYPES.items() if name not in kept]
    names = (*LOG_TYPES, *EXTRA_LOG_TYPES)
    raw = chunk.read()
    options: dict[str, Any] = {"has_header": False, "quote_char": None, "encoding": "utf8-lossy"}
    try:
        typed = pl.read_csv(raw, schema={n: kept.get(n, pl.String) for n in header}, ignore_errors=True, **options)
        if not any(typed[name].null_count() for name in kept):
            return typed.select(*kept, *zeros).select(names)
    except pl.exceptions.NoDataError:
        return pl.DataFrame(schema=LOG_TYPES | EXTRA_LOG_TYPES)
    except pl.exceptions.ComputeError:  # some line has too many fields
        pass
    # Some cell is no whole number: split the lines one by one.
    fields = pl.col("line").str.strip_chars_end("\r").str.split(",")
    cells = [
        fields.list.get(i, null_on_oob=True).cast(pl.Float64, strict=False).alias(name)
        for i, name in enumerate(header)
        if name in kept
    ]
    numbers = [pl.when(pl.col(n).floor() == pl.col(n)).then(n).cast(t, strict=False).alias(n) for n, t in kept.items()]
    surplus = (fields.list.len() > len(header)).fill_null(False)
    lines = pl.read_csv(raw, schema={"line": pl.String}, separator="\x01", **options).lazy()
    rows = lines.select(*cells, surplus.alias("surplus")).select(*numbers, *zeros, "surplus")
    time = pl.when(~pl.col("surplus")).then("time_ms").alias("time_ms")
    return rows.with_columns(time).select(names).collect()


def read_users(paths: tuple[pathlib.Path, ...]) -> pl.DataFrame:
    """User features, one row per user: `user_id` Int32, `user_active_degree` String, the others Float64."""
    frame = pl.concat([_read_strings(whole(path), USER_COLUMNS) for path in paths])
    numbers = [name for name in USER_COLUMNS if name not in ("user_id", "user_active_degree")]
    return frame.with_columns(
        _number("user_id").cast(pl.Int32, strict=False), *(_number(name) for name in numbers)
    ).unique("user_id", keep="first", maintain_order=True)


def read_videos(chunk: Chunk) -> pl.DataFrame:
    """Lines of basic video features.

    Columns: `video_id` Int32, `author_id` Int64, `video_type` and `upload_type` String, `upload_dt` Int32 (20220409),
    `duration_ms` Float64 (null unless positive), `tag` Int32 (the first of the video's tags).
    """
    frame = _read_strings(chunk, VIDEO_COLUMNS)
    duration = _number("video_duration")
    return frame.select(
        _number("video_id").cast(pl.Int32, strict=False),
        _number("author_id").cast(pl.Int64, strict=False),
        pl.col("video_type", "upload_type"),
        pl.col("upload_dt").str.slice(0, 10).str.replace_all("-", "", literal=True).cast(pl.Int32, strict=False),
        pl.when(duration > 0).then(duration).alias("duration_ms"),
        pl.col("tag").str.extract(r"^\s*(\d+)").cast(pl.Int32, strict=False),
    )


def _number(name: str) -> pl.Expr:
    value = pl.col(name).cast(pl.Float64, strict=False)
    return pl.when(value.is_finite()).then(value).alias(name)


def _first_line(path: pathlib.Path) -> bytes:
    with open(path, "rb") as f:
        return f.readline()


def _header(path: pathlib.Path, needed: Iterable[str]) -> list[str]:
    header = [name.strip().strip('"') for name in _first_line(path).decode("utf-8-sig", "replace").split(",")]
    if header == [""]:
        raise ValueError(f"{path} is empty; copy it again from the KuaiRand download")
    for name in needed:
        if name not in header:
            raise ValueError(f"{path} has no column {name!r}; copy it again from the KuaiRand download")
    return header


def _read_strings(chunk: Chunk, names: tuple[str, ...]) -> pl.DataFrame:
    schema = dict.fromkeys(_header(chunk.path, names), pl.String)
    try:
        return pl.read_csv(
            chunk.read(), has_header=False, schema=schema, truncate_ragged_lines=True, encoding="utf8-lossy"
        ).select(names)
    except pl.exceptions.NoDataError:
        return pl.DataFrame(schema=dict.fromkeys(names, pl.String))
    except pl.exceptions.PolarsError as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"{chunk.path} cannot be read as CSV ({why}); copy it again from the KuaiRand download"
        ) from error
