"""Cleaning of log rows: usable rows, counts of unusable ones, and facts about videos.

Exact duplicates are removed first (4,677 rows of KuaiRand-Pure's standard log of 25 April to 5 May), before any split,
so that no row can be in two splits. A duration of 0 is replaced by that of the video's features, if known. Duplicates
belong to one user, so all steps work on a subset of users at a time.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable

import numpy as np
import polars as pl

from mmrf_jax.data.readers.kuairand import columns, fits, requests

#: Why a row is unusable; a row counts under the first reason that applies.
REASONS = (
    "lost_digits",
    "unparsable",
    "bad_flag",
    "bad_date",
    "time_not_on_date",
    "negative_play_time",
    "too_long",
    "no_duration",
)
DAY_MS = 24 * 3_600_000
#: The longest play or video in ms. Kuaishou's are shorter; longer values are in another unit.
LONGEST_MS = DAY_MS // 4
_EPOCH = datetime.date(1970, 1, 1).toordinal()
NO_USER = -(2**31)  # stands for an unreadable user id
NEVER = 99999999  # a day after all others
#: Bits of `mentions`: the log has the video in any row, or in a usable row.
IN_LOG = {"standard": 1, "random": 2}
USED = {"standard": 4, "random": 8}

_ALL_COLUMNS = (*columns.LOG_TYPES, *columns.EXTRA_LOG_TYPES, "lost_digits", "random", "readable")
# By user, time and video; then by the others, with the duration last, since it may be repaired.
_ORDER = ("user_id", "time_ms", "video_id", *(n for n in _ALL_COLUMNS if n not in ("user_id", "time_ms", "video_id")))
_ORDER = (*(n for n in _ORDER if n != "duration_ms"), "duration_ms")


def mark(rows: pl.DataFrame, random_file: bool) -> pl.DataFrame:
    """Add to rows of one file whether each is of the `random` log and `readable`; replace null user ids.

    A row with an unreadable is_rand belongs to the log of its file.
    """
    return rows.with_columns(
        pl.col("is_rand").is_between(1, 1).fill_null(random_file).alias("random"),
        pl.all_horizontal(pl.col(n).is_not_null() for n in columns.LOG_TYPES).alias("readable"),
        pl.col("user_id").fill_null(NO_USER),
    )


def clean(rows: pl.DataFrame, known: Callable[[np.ndarray], np.ndarray]) -> tuple[pl.DataFrame, pl.DataFrame, dict]:
    """Clean all rows of some users.

    Args:
      rows: rows returned by `mark`, in any order.
      known: video ids [n] int32 to durations [n] in ms from the features, 0 if unknown.

    Returns:
      The usable rows with the columns of `columns.LOG_TYPES`, sorted by user, time and video (and by the other columns,
      so that the order does not depend on the files); all rows except duplicates, with `reason`, the index in `REASONS`
      of why a row is unusable; and a report `{"standard": counts, "random": counts}` with `rows`, `duplicates`,
      `duration_repaired`, one entry per reason, `used` and `users`. `count_videos` counts videos, over all users.
    """
    read = _by_log(rows)
    rows = _sorted(rows)
    again = pl.all_horizontal(pl.col(n).eq_missing(pl.col(n).shift()) for n in _ORDER) & (pl.int_range(pl.len()) > 0)
    rows = rows.filter(~(again & pl.col("readable")))  # unreadable lines may differ in columns that are not read
    kept = _by_log(rows)
    rows = give_reasons(rows, known)
    report = {}
    for name, random in (("standard", False), ("random", True)):
        mine = rows.filter(pl.col("random") == random)
        used = mine.filter(pl.col("reason").is_null())
        by_reason = dict(mine.group_by("reason").len().iter_rows())
        report[name] = {
            "rows": read.get(random, 0),
            "duplicates": read.get(random, 0) - kept.get(random, 0),
            "rows_without_duplicates": kept.get(random, 0),
            "users_without_duplicates": mine["user_id"].unique().drop_nulls().ne(NO_USER).sum(),
            "duration_repaired": int(used["repaired"].sum()),
            **{key: by_reason.get(i, 0) for i, key in enumerate(REASONS)},
            "used": used.height,
            "users": used["user_id"].n_unique(),
        }
    usable = rows.filter(pl.col("reason").is_null()).select(*columns.LOG_TYPES)
    return usable, rows, report


def give_reasons(rows: pl.DataFrame, known: Callable[[np.ndarray], np.ndarray]) -> pl.DataFrame:
    """Add to rows `repaired`, whether a missing duration was taken from the features, and `reason`.

    Args:
      rows: rows returned by `mark`.
      known: as for `clean`.

    Returns:
      The rows in their order; `reason` is the index in `REASONS` of why a row is unusable, null if it is usable.
    """
    rows = _repair(rows, known)
    midnight, time = midnights(rows["date"]), pl.col("time_ms")
    faults: dict[str, pl.Expr] = {
        "lost_digits": pl.col("lost_digits"),
        "unparsable": ~pl.col("readable"),
        "bad_flag": ~pl.all_horizontal(pl.col(name).is_in([0, 1]) for name in (*columns.SIGNAL_COLUMNS, "is_rand")),
        "bad_date": pl.lit(midnight.is_null()),
        # `date` and `time_ms` of the releases disagree near midnight; other platforms' days are of other time zones.
        "time_not_on_date": (time < midnight - DAY_MS) | (time >= midnight + 2 * DAY_MS),
        "negative_play_time": pl.col("play_time_ms") < 0,
        "too_long": pl.max_horizontal("play_time_ms", "duration_ms") > LONGEST_MS,
        "no_duration": pl.col("duration_ms") <= 0,
    }
    reason = pl.coalesce(pl.when(faults[name]).then(pl.lit(i, pl.Int8)) for i, name in enumerate(REASONS))
    return rows.with_columns(reason.alias("reason"))


def midnights(dates: pl.Series) -> pl.Series:
    """Return when days such as 20220409 begin in Beijing, in ms since 1970; null for invalid days."""
    start: dict[int, int] = {}
    for date in dates.unique().drop_nulls().to_list():
        with contextlib.suppress(ValueError):  # not a day
            start[date] = (fits.day_number(date) - _EPOCH) * DAY_MS - requests.UTC_OFFSET_MS
    return dates.replace_strict(start, default=None, return_dtype=pl.Int64)


def _sorted(rows: pl.DataFrame) -> pl.DataFrame:
    """Return `rows.sort(_ORDER)`: sort by user and time, then sort ties by all columns."""
    time = rows["time_ms"]
    keys = rows["user_id"].to_numpy(), time.is_not_null().to_numpy(), time.fill_null(0).to_numpy()
    order = fits.order_of(*keys)
    same = np.logical_and.reduce([key[order[1:]] == key[order[:-1]] for key in keys])
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    order[tied] = order[tied][rows[order[tied]].select(pl.arg_sort_by(_ORDER)).to_series().to_numpy()]
    return rows[order]


def _by_log(rows: pl.DataFrame) -> dict[bool, int]:
    random = int(rows["random"].sum())
    return {False: len(rows) - random, True: random}


def _repair(rows: pl.DataFrame, known: Callable[[np.ndarray], np.ndarray]) -> pl.DataFrame:
    """Replace missing durations by those of the features; `repaired` marks them."""
    duration = rows["duration_ms"].fill_null(0).to_numpy().copy()
    missing = np.flatnonzero(duration <= 0)
    found = known(rows["video_id"].gather(missing).fill_null(NO_USER).to_numpy())
    readable = rows["readable"].gather(missing).to_numpy()
    repaired = np.zeros(len(rows), bool)
    repaired[missing] = (found > 0) & readable
    duration[missing] = np.where(repaired[missing], found, duration[missing])
    return rows.with_columns(pl.Series("duration_ms", duration), pl.Series("repaired", repaired))


def describe_videos(rows: pl.DataFrame, train_until: int) -> pl.DataFrame:
    """Summarise what rows contain about their videos, one row per video, sorted by `video_id`.

    Args:
      rows: the second output of `clean`.
      train_until: last training day.

    Returns:
      `seen`: first day of a usable row, or NEVER; `seen_time` and `seen_ms`: time and duration (ms) of its first row;
      `random`: first day of a usable row of the random log, or NEVER; `train`: usable rows of the standard log on
      training days; `mentions`: the bits of `IN_LOG` and `USED`.
    """
    used, random = pl.col("reason").is_null(), pl.col("random")

    def day(which):
        return pl.when(which).then("date").otherwise(NEVER).cast(pl.Int32)

    def bits(names):
        return pl.when(random).then(names["random"]).otherwise(names["standard"])

    return fold_videos(
        rows.filter(pl.col("video_id").is_not_null()).select(
            "video_id",
            day(used).alias("seen"),
            pl.col("time_ms").fill_null(0).alias("seen_time"),
            pl.col("duration_ms").alias("seen_ms"),
            day(used & random).alias("random"),
            (used & ~random & (pl.col("date") <= train_until)).fill_null(False).cast(pl.Int64).alias("train"),
            (bits(IN_LOG) + pl.when(used).then(bits(USED)).otherwise(0)).cast(pl.UInt8).alias("mentions"),
        )
    )


def fold_videos(facts: pl.DataFrame) -> pl.DataFrame:
    """Merge rows of the same video, in the columns of `describe_videos`; among equal times the first row counts."""
    n = len(facts)
    if not n:
        return facts
    facts = facts[fits.order_of(facts["video_id"].to_numpy())]

    def column(name):
        return facts[name].to_numpy()

    first = np.flatnonzero(np.diff(column("video_id"), prepend=NO_USER - 1))
    of = np.repeat(np.arange(len(first)), np.diff(first, append=n))
    # For each video: the first row among those of the first time on the first day.
    on_day = column("seen") == np.minimum.reduceat(column("seen"), first)[of]
    time = np.where(on_day, column("seen_time"), np.iinfo(np.int64).max)
    in_time = on_day & (time == np.minimum.reduceat(time, first)[of])
    earliest = np.minimum.reduceat(np.where(in_time, np.arange(n), n), first)
    return facts.select("video_id", "seen", "seen_time", "seen_ms")[earliest].with_columns(
        pl.Series("random", np.minimum.reduceat(column("random"), first)),
        pl.Series("train", np.add.reduceat(column("train"), first)),
        pl.Series("mentions", np.bitwise_or.reduceat(column("mentions"), first)),
    )


def count_videos(mentions: np.ndarray) -> dict[str, dict[str, int]]:
    """Count the videos of each log, from the `mentions` [n] of all distinct videos."""
    return {
        log: {
            "videos_without_duplicates": int((mentions & IN_LOG[log] > 0).sum()),
            "videos": int((mentions & USED[log] > 0).sum()),
        }
        for log in IN_LOG
    }
