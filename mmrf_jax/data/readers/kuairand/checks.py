"""Plausibility checks of a log: units of times and lengths, and the first unusable row.

Single rows that contradict themselves are left out and counted (`clean`). If most rows of a file do, the file is in
another format than the release, and the error names it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from mmrf_jax.data.readers.kuairand import clean, columns, lines
from mmrf_jax.data.readers.kuairand.clean import DAY_MS, LONGEST_MS

#: Conversion of a time in another unit to ms, and its description.
_TIME_UNITS = {"seconds": (1e3, "multiply it by 1,000"), "microseconds": (1e-3, "divide it by 1,000")}
_TIME_UNITS["nanoseconds"] = (1e-6, "divide it by 1,000,000")
_LONG_VIEW_MS = 18_000  # of play, or all of a shorter video, make a long view
_EXAMPLES = {"user_id": "30", "video_id": "1300", "date": "20220422", "time_ms": "1650610747599", "tab": "1"}
_EXAMPLES |= {"play_time_ms": "18312", "duration_ms": "36438"}


def is_random(path: pathlib.Path) -> bool:
    """Return whether a file belongs to the random log, as its name says."""
    return path.name.startswith("log_random")


def count(rows: pl.DataFrame, random_file: bool) -> dict[str, int]:
    """Count in rows returned by `clean.mark` what `check` compares; counts of parts of a file add up."""
    midnight = clean.midnights(rows["date"])
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


def check(path: pathlib.Path, counts: dict[str, int], find: Callable[[str], str]) -> None:
    """Raise ValueError if most rows of a log's file indicate another format.

    Args:
      path: the file.
      counts: output of `count` over all its rows.
      find: returns the first row of the file that is unusable for a reason of `clean.REASONS`, in words.
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
        here, other = ("random", "standard") if is_random(path) else ("standard", "random")
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
      known: as for `clean.clean`.
      reasons: reasons to look for.

    Returns:
      Its line and cell, such as `line 2: date is '2022-04-22', not a whole number such as 20220422`.
    """
    places = [clean.REASONS.index(reason) for reason in reasons]
    before = lines.read_top(path).count(b"\n")
    for chunk in lines.chunks(path, chunk_bytes):
        rows = clean.give_reasons(clean.mark(columns.read_log(chunk), is_random(path)), known)
        found = rows["reason"].is_in(places).arg_true()
        raw = chunk.read()
        if len(found):
            at = found[0]
            number = [i for i, line in enumerate(raw.split(b"\n"), 1) if line.decode("utf-8", "replace").strip()][at]
            cells = lines.split(raw)[at].to_list()
            what = _describe(lines.read_header(path, columns.LOG_TYPES), cells, rows.row(at, named=True))
            return f"line {before + number:,}: {what}"
        before += raw.count(b"\n")
    return None


def _describe(header: list[str], cells: list[str], row: dict) -> str:
    """Describe why a row is unusable, with the first cell that shows it."""
    if len(cells) != len(header):
        return f"it has {len(cells)} fields, the header {len(header)}"
    reason = clean.REASONS[row["reason"]]

    def cell(name):
        return f"{name} is {cells[header.index(name)]!r}"

    if reason in ("lost_digits", "unparsable"):
        name = next(name for name in columns.LOG_TYPES if row[name] is None or row[name] == clean.NO_USER)
        form = f"a whole number such as {_EXAMPLES[name]}" if name in _EXAMPLES else "0 or 1"
        return f"{cell(name)}, not {form}"
    if reason == "bad_flag":
        name = next(name for name in (*columns.SIGNAL_COLUMNS, "is_rand") if row[name] not in (0, 1))
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
