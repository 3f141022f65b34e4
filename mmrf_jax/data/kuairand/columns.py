"""The official file layout of KuaiRand-Pure, -1K and -27K: which files there are and which columns they hold.

Every reader returns a polars frame in which a cell that is no number is null; `clean` counts what cannot be used.
"""

from __future__ import annotations

import dataclasses
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


def read_log(path: pathlib.Path) -> pl.DataFrame:
    """One log file: the columns of `LOG_TYPES` and `EXTRA_LOG_TYPES` (zeros where the file lacks one of the latter).

    A cell that is no whole number in its column's range is null; so are the cells that a short line lacks, and the
    time of a line with too many.

    Raises:
      ValueError: for an empty file or a missing column.
    """
    header = _header(path, LOG_TYPES)
    options: dict[str, Any] = {"has_header": False, "skip_rows": 1, "quote_char": None, "encoding": "utf8-lossy"}
    kept = {name: kind for name, kind in {**LOG_TYPES, **EXTRA_LOG_TYPES}.items() if name in header}
    numbers = [pl.when(pl.col(n).floor() == pl.col(n)).then(n).cast(t, strict=False).alias(n) for n, t in kept.items()]
    zeros = [pl.lit(0, dtype=kind).alias(name) for name, kind in EXTRA_LOG_TYPES.items() if name not in kept]
    schema = {name: pl.Float64 if name in kept else pl.String for name in header}
    names = (*LOG_TYPES, *EXTRA_LOG_TYPES)
    try:
        fast = pl.scan_csv(path, schema=schema, ignore_errors=True, **options)
        return fast.select(*numbers, *zeros).select(names).collect(engine="streaming")
    except pl.exceptions.NoDataError:  # a header and nothing else
        return pl.DataFrame(schema=LOG_TYPES | EXTRA_LOG_TYPES)
    except pl.exceptions.ComputeError:  # some line has too many fields: split the lines one by one
        fields = pl.col("line").str.split(",")
        cells = [
            fields.list.get(i, null_on_oob=True).cast(pl.Float64, strict=False).alias(name)
            for i, name in enumerate(header)
            if name in kept
        ]
        lines = pl.scan_csv(path, schema={"line": pl.String}, separator="\x01", **options)
        surplus = fields.list.len() > len(header)
        slow = lines.select(*cells, surplus.alias("surplus")).select(*numbers, *zeros, "surplus")
        time = pl.when(~pl.col("surplus").fill_null(False)).then("time_ms").alias("time_ms")
        return slow.with_columns(time).select(names).collect(engine="streaming")


def read_users(paths: tuple[pathlib.Path, ...]) -> pl.DataFrame:
    """User features, one row per user: `user_id` Int32, `user_active_degree` String, the others Float64."""
    frame = pl.concat([_read_strings(path, USER_COLUMNS) for path in paths])
    numbers = [name for name in USER_COLUMNS if name not in ("user_id", "user_active_degree")]
    return frame.with_columns(
        _number("user_id").cast(pl.Int32, strict=False), *(_number(name) for name in numbers)
    ).unique("user_id", keep="first", maintain_order=True)


def read_videos(paths: tuple[pathlib.Path, ...]) -> pl.DataFrame:
    """Basic video features, one row per video.

    Columns: `video_id` Int32, `author_id` Int64, `video_type` and `upload_type` String, `upload_dt` Int32 (20220409),
    `duration_ms` Float64 (null unless positive), `tag` Int32 (the first of the video's tags).
    """
    frame = pl.concat([_read_strings(path, VIDEO_COLUMNS) for path in paths])
    duration = _number("video_duration")
    return frame.select(
        _number("video_id").cast(pl.Int32, strict=False),
        _number("author_id").cast(pl.Int64, strict=False),
        pl.col("video_type", "upload_type"),
        pl.col("upload_dt").str.slice(0, 10).str.replace_all("-", "").cast(pl.Int32, strict=False),
        pl.when(duration > 0).then(duration).alias("duration_ms"),
        pl.col("tag").str.extract(r"^\s*(\d+)").cast(pl.Int32, strict=False),
    ).unique("video_id", keep="first", maintain_order=True)


def _number(name: str) -> pl.Expr:
    value = pl.col(name).cast(pl.Float64, strict=False)
    return pl.when(value.is_finite()).then(value).alias(name)


def _header(path: pathlib.Path, needed: Iterable[str]) -> list[str]:
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        header = [name.strip().strip('"') for name in f.readline().split(",")]
    if header == [""]:
        raise ValueError(f"{path} is empty; copy it again from the KuaiRand download")
    for name in needed:
        if name not in header:
            raise ValueError(f"{path} has no column {name!r}; copy it again from the KuaiRand download")
    return header


def _read_strings(path: pathlib.Path, names: tuple[str, ...]) -> pl.DataFrame:
    _header(path, names)
    try:
        return pl.read_csv(path, infer_schema=False, truncate_ragged_lines=True, encoding="utf8-lossy").select(names)
    except pl.exceptions.PolarsError as error:
        raise ValueError(
            f"{path} cannot be read as CSV ({str(error).splitlines()[0]}); copy it again from the KuaiRand download"
        ) from error
