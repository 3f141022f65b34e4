"""Cleaning of log rows: usable rows, counts of unusable ones, facts about videos, and files in another format.

Exact duplicates are removed first (4,677 rows of KuaiRand-Pure's standard log of 25 April to 5 May), before any split,
so that no row can be in two splits. A duration of 0 is replaced by that of the video's features, if known. Duplicates
belong to one user, so all steps work on a subset of users at a time.

Single rows that contradict themselves are left out and counted. If most rows of a file do, the file is in another
format than the release (units of times and lengths), and the error of `check_format` names it.
"""

from __future__ import annotations

import contextlib
import datetime
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from mmrf_jax.data.readers.engine.grouping import order_of
from mmrf_jax.data.readers.kuairand import csv_files, release

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
UTC_OFFSET_MS = 8 * 3_600_000  # Kuaishou's days are in Beijing time
#: The longest play or video in ms. Kuaishou's are shorter; longer values are in another unit.
LONGEST_MS = DAY_MS // 4
_EPOCH = datetime.date(1970, 1, 1).toordinal()
NO_USER = -(2**31)  # stands for an unreadable user id
NEVER = 99999999  # a day after all others
#: Bits of `mentions`: the log has the video in any row, or in a usable row.
IN_LOG = {"standard": 1, "random": 2}
USED = {"standard": 4, "random": 8}

_ALL_COLUMNS = (*csv_files.LOG_TYPES, *csv_files.EXTRA_LOG_TYPES, "lost_digits", "random", "readable")
# By user, time and video; then by the others, with the duration last, since it may be repaired.
_ORDER = ("user_id", "time_ms", "video_id", *(n for n in _ALL_COLUMNS if n not in ("user_id", "time_ms", "video_id")))
_ORDER = (*(n for n in _ORDER if n != "duration_ms"), "duration_ms")

#: Conversion of a time in another unit to ms, and its description.
_TIME_UNITS = {"seconds": (1e3, "multiply it by 1,000"), "microseconds": (1e-3, "divide it by 1,000")}
_TIME_UNITS["nanoseconds"] = (1e-6, "divide it by 1,000,000")
_LONG_VIEW_MS = 18_000  # of play, or all of a shorter video, make a long view
_EXAMPLES = {"user_id": "30", "video_id": "1300", "date": "20220422", "time_ms": "1650610747599", "tab": "1"}
_EXAMPLES |= {"play_time_ms": "18312", "duration_ms": "36438"}


def mark(rows: pl.DataFrame, random_file: bool) -> pl.DataFrame:
    """Add to rows of one file whether each is of the `random` log and `readable`; replace null user ids.

    A row with an unreadable is_rand belongs to the log of its file.
    """
    return rows.with_columns(
        pl.col("is_rand").is_between(1, 1).fill_null(random_file).alias("random"),
        pl.all_horizontal(pl.col(n).is_not_null() for n in csv_files.LOG_TYPES).alias("readable"),
        pl.col("user_id").fill_null(NO_USER),
    )


def clean_rows(
    rows: pl.DataFrame, known: Callable[[np.ndarray], np.ndarray]
) -> tuple[pl.DataFrame, pl.DataFrame, dict]:
    """Clean all rows of some users.

    Args:
      rows: rows returned by `mark`, in any order.
      known: video ids [n] int32 to durations [n] in ms from the features, 0 if unknown.

    Returns:
      The usable rows with the columns of `csv_files.LOG_TYPES`, sorted by user, time and video (and by the other
      columns, so that the order does not depend on the files); all rows except duplicates, with `reason`, the index in
      `REASONS` of why a row is unusable; and a report `{"standard": counts, "random": counts}` with `rows`,
      `duplicates`, `duration_repaired`, one entry per reason, `used` and `users`. `count_videos` counts videos, over
      all users.
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
    usable = rows.filter(pl.col("reason").is_null()).select(*csv_files.LOG_TYPES)
    return usable, rows, report


def give_reasons(rows: pl.DataFrame, known: Callable[[np.ndarray], np.ndarray]) -> pl.DataFrame:
    """Add to rows `repaired`, whether a missing duration was taken from the features, and `reason`.

    Args:
      rows: rows returned by `mark`.
      known: as for `clean_rows`.

    Returns:
      The rows in their order; `reason` is the index in `REASONS` of why a row is unusable, null if it is usable.
    """
    rows = _repair(rows, known)
    midnight, time = midnights(rows["date"]), pl.col("time_ms")
    faults: dict[str, pl.Expr] = {
        "lost_digits": pl.col("lost_digits"),
        "unparsable": ~pl.col("readable"),
        "bad_flag": ~pl.all_horizontal(pl.col(name).is_in([0, 1]) for name in (*csv_files.SIGNAL_COLUMNS, "is_rand")),
        "bad_date": pl.lit(midnight.is_null()),
        # `date` and `time_ms` of the releases disagree near midnight; other platforms' days are of other time zones.
        "time_not_on_date": (time < midnight - DAY_MS) | (time >= midnight + 2 * DAY_MS),
        "negative_play_time": pl.col("play_time_ms") < 0,
        "too_long": pl.max_horizontal("play_time_ms", "duration_ms") > LONGEST_MS,
        "no_duration": pl.col("duration_ms") <= 0,
    }
    reason = pl.coalesce(pl.when(faults[name]).then(pl.lit(i, pl.Int8)) for i, name in enumerate(REASONS))
    return rows.with_columns(reason.alias("reason"))


def day_number(date: int) -> int:
    return datetime.date(date // 10000, date // 100 % 100, date % 100).toordinal()


def midnights(dates: pl.Series) -> pl.Series:
    """Return when days such as 20220409 begin in Beijing, in ms since 1970; null for invalid days."""
    start: dict[int, int] = {}
    for date in dates.unique().drop_nulls().to_list():
        with contextlib.suppress(ValueError):  # not a day
            start[date] = (day_number(date) - _EPOCH) * DAY_MS - UTC_OFFSET_MS
    return dates.replace_strict(start, default=None, return_dtype=pl.Int64)


def _sorted(rows: pl.DataFrame) -> pl.DataFrame:
    """Return `rows.sort(_ORDER)`: sort by user and time, then sort ties by all columns."""
    time = rows["time_ms"]
    keys = rows["user_id"].to_numpy(), time.is_not_null().to_numpy(), time.fill_null(0).to_numpy()
    order = order_of(*keys)
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
      rows: the second output of `clean_rows`.
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
    facts = facts[order_of(facts["video_id"].to_numpy())]

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


def count_format_signs(rows: pl.DataFrame, random_file: bool) -> dict[str, int]:
    """Count in rows returned by `mark` what `check_format` compares; counts of parts of a file add up."""
    midnight = midnights(rows["date"])
    time, play, duration, length = pl.col("time_ms"), pl.col("play_time_ms"), pl.col("duration_ms"), pl.col("length")

    def on_date(when):
        return (when >= midnight - DAY_MS) & (when < midnight + 2 * DAY_MS)

    counts = rows.with_columns(length=pl.min_horizontal(duration, _LONG_VIEW_MS)).select(
        rows=pl.len(),
        lost_digits=pl.col("lost_digits").sum(),
        of_a_log=pl.col("is_rand").is_in([0, 1]).sum(),
        of_the_other=(pl.col("is_rand") == 1 - random_file).sum(),
        dated=(midnight.is_not_null() & time.is_not_null()).sum(),
        off_date=(~on_date(time)).sum(),
        durations=(duration > 0).sum(),
        short_durations=duration.is_between(1, 999).sum(),
        long_durations=(duration > LONGEST_MS).sum(),
        plays=(play > 0).sum(),
        short_plays=play.is_between(1, 999).sum(),
        short_long_views=((pl.col("long_view") == 1) & (play > 0) & (play < length)).sum(),
        lengths=((play > 0) & (duration > 0)).sum(),
        long_plays=((duration > 0) & (play > 10 * duration.cast(pl.Int64))).sum(),
    )
    units = dict.fromkeys(_TIME_UNITS, 0)
    if counts["off_date"].item():
        scaled = {name: on_date(time.cast(pl.Float64) * scale).sum() for name, (scale, _) in _TIME_UNITS.items()}
        units = rows.select(**scaled).row(0, named=True)
    return counts.row(0, named=True) | units


def check_format(path: pathlib.Path, counts: dict[str, int], find: Callable[[str], str]) -> None:
    """Raise ValueError if most rows of a log's file indicate another format.

    Args:
      path: the file.
      counts: output of `count_format_signs` over all its rows.
      find: returns the first row of the file that is unusable for a reason of `REASONS`, in words.
    """

    def most(part, whole):
        return 2 * counts[part] > counts[whole]

    def share(part, whole):
        return f"{counts[part]:,} of {counts[whole]:,} rows"

    if most("lost_digits", "rows"):
        raise ValueError(
            f"{path}: {share('lost_digits', 'rows')} lack digits that a spreadsheet rounded off "
            f"({find('lost_digits')}); export the numbers in full"
        )
    if most("of_the_other", "of_a_log"):
        here, other = ("random", "standard") if release.is_random(path) else ("standard", "random")
        raise ValueError(
            f"{path}: by their is_rand, {share('of_the_other', 'of_a_log')} are of the {other} log, the name says "
            f"{here}; rename the file or correct is_rand"
        )
    if most("off_date", "dated"):
        fix = "correct time_ms, which is in milliseconds since 1970, or date, such as 20220422"
        unit = max(_TIME_UNITS, key=lambda name: counts[name])
        if 2 * counts[unit] > counts["off_date"]:
            fix = f"time_ms is in {unit}: {_TIME_UNITS[unit][1]}"
        raise ValueError(
            f"{path}: time_ms of {share('off_date', 'dated')} is not on their date ({find('time_not_on_date')}); {fix}"
        )
    for part, what, unit, fix in (
        ("short_durations", "below a second", "seconds", "multiply it by 1,000"),
        ("long_durations", "above six hours", "microseconds", "divide it by 1,000"),
    ):
        if most(part, "durations"):
            raise ValueError(f"{path}: duration_ms of {share(part, 'durations')} is {what}, as if in {unit}; {fix}")
    # One play in seven is shorter than a second, so here "most" is nine in ten, and long views must confirm it.
    if 10 * counts["short_plays"] > 9 * counts["plays"] and counts["short_long_views"]:
        raise ValueError(
            f"{path}: play_time_ms of {share('short_plays', 'plays')} with a play is below a second, long views "
            "among them, as if in seconds; multiply it by 1,000"
        )
    if most("long_plays", "lengths"):
        raise ValueError(
            f"{path}: play_time_ms of {share('long_plays', 'lengths')} is above ten times duration_ms, as if in "
            "microseconds; divide it by 1,000"
        )


def check_durations(path: pathlib.Path, duration_ms: np.ndarray) -> None:
    """Raise ValueError if most durations [V] of the video features, 0 where unknown, are in another unit."""
    known = int((duration_ms > 0).sum())
    for part, what, unit, fix in (
        ((duration_ms > 0) & (duration_ms < 1_000), "below a second", "seconds", "multiply it by 1,000"),
        (duration_ms > LONGEST_MS, "above six hours", "microseconds", "divide it by 1,000"),
    ):
        if 2 * part.sum() > known:
            raise ValueError(
                f"{path}: video_duration of {part.sum():,} of {known:,} videos is {what}, as if in {unit}; {fix}, for "
                "it is in milliseconds"
            )


def find_unusable(
    path: pathlib.Path, chunk_bytes: int, known: Callable[[np.ndarray], np.ndarray], reasons: Sequence[str]
) -> str | None:
    """Find the first row of a log's file that is unusable for one of some reasons; None if there is none.

    Args:
      path: the file.
      chunk_bytes: number of bytes to read at a time.
      known: as for `clean_rows`.
      reasons: reasons to look for.

    Returns:
      Its line and cell, such as `line 2: date is '2022-04-22', not a whole number such as 20220422`.
    """
    places = [REASONS.index(reason) for reason in reasons]
    before = csv_files.read_top(path).count(b"\n")
    for chunk in csv_files.chunks(path, chunk_bytes):
        rows = give_reasons(mark(csv_files.read_log_lines(chunk), release.is_random(path)), known)
        found = rows["reason"].is_in(places).arg_true()
        raw = chunk.read()
        if len(found):
            at = found[0]
            number = [i for i, line in enumerate(raw.split(b"\n"), 1) if line.decode("utf-8", "replace").strip()][at]
            cells = csv_files.split_cells(raw)[at].to_list()
            what = _describe(csv_files.read_header(path, csv_files.LOG_TYPES), cells, rows.row(at, named=True))
            return f"line {before + number:,}: {what}"
        before += raw.count(b"\n")
    return None


def _describe(header: list[str], cells: list[str], row: dict) -> str:
    """Describe why a row is unusable, with the first cell that shows it."""
    if len(cells) != len(header):
        return f"it has {len(cells)} fields, the header {len(header)}"
    reason = REASONS[row["reason"]]

    def cell(name):
        return f"{name} is {cells[header.index(name)]!r}"

    if reason in ("lost_digits", "unparsable"):
        name = next(name for name in csv_files.LOG_TYPES if row[name] is None or row[name] == NO_USER)
        form = f"a whole number such as {_EXAMPLES[name]}" if name in _EXAMPLES else "0 or 1"
        return f"{cell(name)}, not {form}"
    if reason == "bad_flag":
        name = next(name for name in (*csv_files.SIGNAL_COLUMNS, "is_rand") if row[name] not in (0, 1))
        return f"{cell(name)}, not 0 or 1"
    if reason == "bad_date":
        return f"{cell('date')}, no day"
    if reason == "time_not_on_date":
        return f"{cell('time_ms')}, {cell('date')}"
    if reason == "too_long":
        return cell("play_time_ms" if row["play_time_ms"] > LONGEST_MS else "duration_ms")
    if reason == "no_duration":
        return f"{cell('duration_ms')}, and the features have none of its video"
    return cell("play_time_ms")
