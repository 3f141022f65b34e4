"""From log files to rows that can be used, and a report of every row that cannot.

Exact duplicates go first (4,677 rows of KuaiRand-Pure's standard log of 25 April to 5 May), before anything is split,
so that no row can be in two splits. A duration of 0 is taken from the video's features where they have it.
"""

from __future__ import annotations

import datetime

import polars as pl
from absl import logging

from mmrf_jax.data.kuairand import columns

#: Why a row is not used; a row counts under the first reason that holds.
REASONS = ("unparsable", "bad_flag", "bad_date", "negative_play_time", "no_duration")


def clean_log(source: columns.Source, videos: pl.DataFrame) -> tuple[pl.DataFrame, dict]:
    """Reads all log files.

    Args:
      source: the files.
      videos: as `columns.read_videos` gives them; their duration repairs rows without one.

    Returns:
      The usable rows with the columns of `columns.LOG_TYPES`, sorted by user, time and video (and by the other columns,
      so that the order does not depend on the files), and a report `{"standard": counts, "random": counts}` with
      `rows`, `duplicates`, `duration_repaired`, one entry per reason of `REASONS`, `used`, `users` and `videos`.
    """
    frames = [columns.read_log(path) for path in source.logs]
    # a row whose is_rand cannot be read belongs to the log of its file
    is_random_file = [path.name.startswith("log_random") for path in source.logs]
    rows = pl.concat(
        frame.with_columns(pl.col("is_rand").is_between(1, 1).fill_null(random).alias("random"))
        for frame, random in zip(frames, is_random_file, strict=True)
    )
    del frames
    read = _counts(rows, "rows")
    rows = rows.unique()
    kept = _counts(rows, "rows")

    rows = rows.join(videos.select("video_id", pl.col("duration_ms").alias("known")), "video_id", "left")
    missing = pl.col("duration_ms").fill_null(0) <= 0
    repaired = missing & pl.col("known").is_not_null()
    readable = pl.all_horizontal(pl.col(n).is_not_null() for n in columns.LOG_TYPES)
    rows = rows.with_columns(
        pl.when(repaired & readable).then(pl.col("known").cast(pl.Int32)).otherwise("duration_ms").alias("duration_ms"),
        repaired.alias("repaired"),
    ).drop("known")
    flags = pl.all_horizontal(pl.col(name).is_in([0, 1]) for name in (*columns.SIGNAL_COLUMNS, "is_rand"))
    dates = [d for d in rows["date"].unique().drop_nulls().to_list() if _is_date(d)]
    reason = (
        pl.when(~readable)
        .then(pl.lit(REASONS[0]))
        .when(~flags)
        .then(pl.lit(REASONS[1]))
        .when(~pl.col("date").is_in(dates))
        .then(pl.lit(REASONS[2]))
        .when(pl.col("play_time_ms") < 0)
        .then(pl.lit(REASONS[3]))
        .when(missing)
        .then(pl.lit(REASONS[4]))
    )
    rows = rows.with_columns(reason.alias("reason"))
    usable = rows.filter(pl.col("reason").is_null())
    report = {}
    for name, random in (("standard", False), ("random", True)):
        mine, good = rows.filter(pl.col("random") == random), usable.filter(pl.col("random") == random)
        by_reason = dict(mine.group_by("reason").len().iter_rows())
        report[name] = {
            "rows": read.get(random, 0),
            "duplicates": read.get(random, 0) - kept.get(random, 0),
            "rows_without_duplicates": kept.get(random, 0),
            "users_without_duplicates": mine["user_id"].drop_nulls().n_unique(),
            "videos_without_duplicates": mine["video_id"].drop_nulls().n_unique(),
            "duration_repaired": int(good["repaired"].sum()),
            **{key: by_reason.get(key, 0) for key in REASONS},
            "used": good.height,
            "users": good["user_id"].n_unique(),
            "videos": good["video_id"].n_unique(),
        }
        logging.info("KuaiRand %s log: %s", name, ", ".join(f"{k} {v}" for k, v in report[name].items()))
    first = ["user_id", "time_ms", "video_id"]
    order = first + [name for name in columns.LOG_TYPES if name not in first]
    return usable.select(*columns.LOG_TYPES).sort(order), report


def _counts(rows: pl.DataFrame, name: str) -> dict[bool, int]:
    return dict(rows.group_by("random").agg(pl.len().alias(name)).iter_rows())


def _is_date(date: int) -> bool:
    try:
        datetime.date(date // 10000, date // 100 % 100, date % 100)
    except ValueError:
        return False
    return True
