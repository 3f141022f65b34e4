"""The columns of a log as arrays: ids, times, signals and propensities, each checked against the schema.

A value that cannot be (a like of 7, a propensity of 1.2) is an error that names its column and row. A row without user,
item, time or main signal, or a repeated one, is left out and counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from mmrf_jax.schema import TIME_UNITS, Schema
from mmrf_jax.signals import UNITS, Signal

ROW = "__row"  # number of a row in the given table, from 0
_SHORTEST_MEDIAN, _LONGEST_MEDIAN = 0.05, 3_600.0  # seconds of plausible feedback
_LONGEST_ITEM = 14_400.0  # median seconds of plausible items
_ISO = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
_ISO_ZONED = ("%Y-%m-%d %H:%M:%S%.f%:z", "%Y-%m-%d %H:%M:%S%.f%z", "%Y-%m-%d %H:%M%:z")
_MIN_TIMES = {"s": 1e8, "ms": 1e11, "us": 1e14, "ns": 1e17}  # of dates after 1973


@dataclasses.dataclass
class Notes:
    """What was assumed about a log, and how many rows were left out, by reason; those of parts of a log add up.

    Attributes:
      assumed: texts.
      counted: {text: [number, of how many, or 0]} of texts that begin with a number, such as "empty cells of like are
        0"; those with a number of 0 are not said.
      left_out: {reason: rows}.
    """

    assumed: list[str] = dataclasses.field(default_factory=list)
    counted: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)

    def assume(self, text: str) -> None:
        """Note a text once."""
        if text not in self.assumed:
            self.assumed.append(text)

    def count(self, text: str, number: int, among: int = 0) -> None:
        """Add to the numbers of a text."""
        have = self.counted.setdefault(text, [0, 0])
        have[0] += number
        have[1] += among

    def leave_out(self, reason: str, rows: int) -> None:
        """Add to the rows left out for a reason."""
        if rows:
            self.left_out[reason] = self.left_out.get(reason, 0) + rows

    def drop(self, frame: pl.DataFrame, unusable: pl.Expr, reason: str) -> pl.DataFrame:
        """Leave out rows and count them."""
        kept = frame.filter(~unusable.fill_null(True))
        self.leave_out(reason, len(frame) - len(kept))
        return kept

    def add(self, other: Mapping[str, Any]) -> None:
        """Add the fields of other notes."""
        for text in other["assumed"]:
            self.assume(text)
        for text, (number, among) in other["counted"].items():
            self.count(text, number, among)
        for reason, rows in other["left_out"].items():
            self.leave_out(reason, rows)

    def lines(self) -> list[str]:
        """Return all that was assumed, in words."""
        counted = [
            f"{number:,} of {among:,} {text}" if among else f"{number:,} {text}"
            for text, (number, among) in self.counted.items()
            if number
        ]
        return self.assumed + counted


def resolve(rows: pl.DataFrame, schema: Schema, notes: Notes) -> Schema:
    """Return the schema with the units that it leaves open, as some rows of the log have them.

    Raises:
      ValueError: if most values cannot be in the unit that they should be in.
    """
    units: dict[str, Any] = {"time_unit": _time_unit(rows[schema.time], schema.time_unit, notes)}
    if schema.duration and schema.duration in rows.columns:
        units["duration_unit"] = duration_unit(rows[schema.duration], schema, notes)
        check_durations(rows[schema.duration], units["duration_unit"])
    longest = _LONGEST_ITEM if schema.duration else _LONGEST_MEDIAN
    for signal in schema.signals:
        column = rows[signal.column or signal.name]
        if signal.kind == "duration" and not isinstance(column.dtype, pl.Duration):
            said = f"column {column.name!r} of the duration signal {signal.name!r} with unit={signal.unit!r}"
            other = "" if schema.duration else "; or name schema.duration if the items are so long"
            _check_unit(_lenient(column) * UNITS[signal.unit], said, longest, "unit", other)
    return dataclasses.replace(schema, **units)


def _lenient(column: pl.Series) -> pl.Series:
    """Return numbers as Float64, null where there is none; `numbers` refuses them, with their rows."""
    if not (column.dtype.is_numeric() or column.dtype in (pl.String, pl.Boolean, pl.Null)):
        return pl.Series(column.name, [], pl.Float64)
    return column.cast(pl.Float64, strict=False).fill_nan(None)


def clean(log: pl.DataFrame, schema: Schema, notes: Notes, start: int = 0) -> pl.DataFrame:
    """Return the usable rows of a piece of a log with typed columns.

    Args:
      log: consecutive rows.
      schema: with units, see `resolve`.
      notes: takes what is assumed and left out.
      start: number of the first row, for messages.

    Returns:
      `user`, `item` and `request` (ids in their own type), `time` (Int64, ms), `position` (Float64), `propensity`
      (Float64), `candidates` (a list of ids), `duration` (Float64, seconds), `random` (Boolean), `s0`, `s1`, …
      (Float32, the signals), `r0`, … and `c0`, … (of `request_by` and the context, as given) and `__row`; without the
      columns that the schema does not name.

    Raises:
      ValueError: for a type that does not fit, or a value that cannot be.
    """
    roles = schema.columns()
    columns: dict[str, pl.Series] = {role: ids(log[roles[role]], start) for role in ("user", "item")}
    columns["time"] = times(log[schema.time], schema, notes, start)
    if schema.request:
        columns["request"] = ids(log[schema.request], start)
    if schema.position:
        columns["position"] = numbers(log[schema.position], start)
    if schema.propensity:
        columns["propensity"] = _propensities(log[schema.propensity], start)
    if schema.candidates and schema.candidates in log.columns:
        columns["candidates"] = id_lists(log[schema.candidates])
    if schema.duration and schema.duration in log.columns:
        columns["duration"] = durations(log[schema.duration], schema.duration_unit, start)
    if schema.random:
        columns["random"] = _signal(log[schema.random], Signal("random", schema.random), start).fill_null(0.0) > 0
    for i, name in enumerate(schema.request_by):
        columns[f"r{i}"] = log[name]
    for i, signal in enumerate(schema.signals):
        columns[f"s{i}"] = _signal(log[signal.column or signal.name], signal, start)
    for i, name in enumerate(schema.context):
        columns[f"c{i}"] = log[name]
    frame = pl.DataFrame({name: column.rename(name) for name, column in columns.items()})
    frame = frame.select(pl.int_range(start, start + len(frame), dtype=pl.Int64).alias(ROW), pl.all())
    for name in ("user", "item", "time", *(["request"] if schema.request else [])):
        frame = notes.drop(frame, pl.col(name).is_null(), f"no {name}")
    main = [signal.name for signal in schema.signals].index(str(schema.main))
    frame = notes.drop(frame, pl.col(f"s{main}").is_null(), f"no {schema.main}")
    for i, signal in enumerate(schema.signals):
        notes.count(f"empty cells of {signal.name} are 0", frame[f"s{i}"].null_count())
    return frame.with_columns(pl.col("^s[0-9]+$").fill_null(0.0))


def without_repeated(frame: pl.DataFrame, notes: Notes) -> pl.DataFrame:
    """Leave out rows that repeat an earlier one of the frame in all but the candidates and the context."""
    same = [name for name in frame.columns if name not in (ROW, "candidates") and not name.startswith("c")]
    kept = frame.unique(same, keep="first", maintain_order=True)
    notes.leave_out("repeated row", len(frame) - len(kept))
    return kept


def first(column: pl.Series, wrong: pl.Series, start: int = 0) -> str:
    """Return the first wrong value of a column and its row, in words; `start` is the number of the first row."""
    at = wrong.fill_null(False).arg_true()[0]
    return f"{column[at]!r} in row {start + at}"


def ids(column: pl.Series, start: int = 0) -> pl.Series:
    """Return ids as Int64, UInt64 or String; NaN, and strings that are empty or blank, are null.

    Raises:
      ValueError: for another type.
    """
    kind = column.dtype
    if kind.is_integer():
        return column if kind == pl.UInt64 else column.cast(pl.Int64)
    if isinstance(kind, pl.Categorical | pl.Enum):
        column, kind = column.cast(pl.String), pl.String()
    if kind == pl.String:
        return pl.select(pl.when(column.str.strip_chars() != "").then(column)).to_series().rename(column.name)
    if kind.is_float():  # integers with empty cells, as pandas holds them
        column = column.fill_nan(None)
        wrong = (column != column.round(0)) | (column.abs() > 2.0**53)
        if not wrong.fill_null(False).any():
            return column.cast(pl.Int64)
        raise ValueError(
            f"column {column.name!r} of ids has {first(column, wrong, start)}; write ids as integers or strings"
        )
    if kind == pl.Null:
        return column.cast(pl.String)
    raise ValueError(f"column {column.name!r} of ids has type {kind}; write ids as integers or strings")


def id_lists(column: pl.Series) -> pl.Series:
    """Return lists of different ids, from a list column or from JSON such as `["a", "b"]`.

    Raises:
      ValueError: for another type.
    """
    if column.dtype == pl.String:
        try:
            column = column.str.json_decode(pl.List(pl.String), infer_schema_length=None)
        except pl.exceptions.PolarsError as error:
            raise ValueError(
                f'column {column.name!r} of candidates is no JSON such as ["a", "b"]; write it so, or as Parquet'
            ) from error
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if not isinstance(column.dtype, pl.List):
        raise ValueError(f"column {column.name!r} of candidates has type {column.dtype}; write a list of item ids")
    flat = ids(column.drop_nulls().explode(empty_as_null=False, keep_nulls=True).rename(column.name))
    found = column.cast(pl.List(flat.dtype), strict=False)
    if flat.null_count():
        if flat.dtype == pl.String:
            found = found.list.eval(pl.element().filter(pl.element().str.strip_chars() != ""))
        found = found.list.drop_nulls()
    if (found.list.n_unique() < found.list.len()).any():
        found = found.list.unique(maintain_order=True)
    return found


def numbers(column: pl.Series, start: int = 0) -> pl.Series:
    """Return numbers as Float64; NaN and empty text are null.

    Raises:
      ValueError: for another type, or an infinite value.
    """
    if column.dtype == pl.String:
        text = column.str.strip_chars()
        parsed = text.cast(pl.Float64, strict=False)
        wrong = parsed.is_null() & (text != "")
        if wrong.any():
            raise ValueError(f"column {column.name!r} has {first(column, wrong, start)}; write numbers")
        column = parsed
    if isinstance(column.dtype, pl.Duration):
        return column.dt.total_microseconds() / 1e6
    if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
        raise ValueError(f"column {column.name!r} has type {column.dtype}; write numbers")
    found = column.cast(pl.Float64).fill_nan(None)
    if found.is_infinite().any():
        raise ValueError(
            f"column {column.name!r} has {first(column, found.is_infinite(), start)}; write finite numbers"
        )
    return found


def _signal(column: pl.Series, signal: Signal, start: int) -> pl.Series:
    """Return a signal as Float32; durations in seconds."""
    of = f"column {column.name!r} of the {signal.kind} signal {signal.name!r}"
    if signal.kind == "binary" and column.dtype == pl.String:
        text = column.str.strip_chars().str.to_lowercase().replace({"true": "1", "false": "0"})
        if (unknown := text.cast(pl.Float64, strict=False).is_null() & (text != "")).any():
            raise ValueError(f"{of} has {first(column, unknown, start)}; write 0 or 1, or true or false")
        column = text.rename(column.name)
    was_duration = isinstance(column.dtype, pl.Duration)
    found = numbers(column, start)
    wrong = {
        "binary": ~found.is_in([0.0, 1.0]),
        "count": (found < 0) | (found != found.round(0)),
        "duration": found < 0,
        "value": found.is_null() & False,
    }[signal.kind].fill_null(False) & found.is_not_null()
    if wrong.any():
        advice = {
            "binary": "write 0 or 1, or choose kind='count', 'duration' or 'value'",
            "count": "write whole numbers from 0, or choose kind='value'",
            "duration": "write 0 or more, or choose kind='value'",
        }[signal.kind]
        raise ValueError(f"{of} has {first(column, wrong, start)}; {advice}")
    if signal.kind == "duration" and not was_duration:
        found = found * UNITS[signal.unit]
    return found.cast(pl.Float32)


def _check_unit(seconds: pl.Series, of: str, longest: float, field: str, other: str = "") -> None:
    """Raise ValueError if the median of positive durations is implausible, naming the field, and another fix."""
    median: Any = seconds.filter(seconds > 0).median()
    if median is None or _SHORTEST_MEDIAN <= median <= longest:
        return
    advice = "a larger unit" if median < _SHORTEST_MEDIAN else f"a smaller {field} such as 'ms'{other}"
    raise ValueError(f"{of} has a median of {median:,.4g} s where it is not 0; choose {advice}")


def durations(column: pl.Series, unit: str | None, start: int = 0) -> pl.Series:
    """Return the items' lengths as Float64 seconds; null where there is none."""
    found = numbers(column, start)
    return found if isinstance(column.dtype, pl.Duration) else found * UNITS[str(unit)]


def duration_unit(column: pl.Series, schema: Schema, notes: Notes) -> str | None:
    """Return the unit of lengths: the schema's, or that of the column's name; None for durations."""
    if schema.duration_unit or isinstance(column.dtype, pl.Duration):
        return schema.duration_unit
    unit = next((u for u in UNITS if column.name.lower().endswith(f"_{u}")), None)
    why = "by the column's name" if unit else "the default: schema.duration_unit is not given"
    notes.assume(f"durations in {column.name} are in {unit or 's'}, {why}")
    return unit or "s"


def check_durations(column: pl.Series, unit: str | None) -> None:
    """Raise ValueError if the median length is implausible."""
    if not isinstance(column.dtype, pl.Duration):
        said = f"column {column.name!r} of durations with duration_unit={unit!r}"
        _check_unit(_lenient(column) * UNITS[str(unit)], said, _LONGEST_ITEM, "schema.duration_unit")


def _propensities(column: pl.Series, start: int) -> pl.Series:
    found = numbers(column, start)
    wrong = (found <= 0) | (found > 1)
    if wrong.any():
        raise ValueError(
            f"column {column.name!r} of propensities has {first(column, wrong, start)}; write probabilities above 0, "
            "at most 1"
        )
    return found


def _time_unit(column: pl.Series, given: str | None, notes: Notes) -> str | None:
    """Return the unit of times that are numbers: the given one, or that of their size; None for other times.

    Raises:
      ValueError: for another type, or if no unit is given and none fits.
    """
    if column.dtype == pl.String:
        if not _are_numbers(column):
            return given
        column = column.cast(pl.Int64, strict=False)
    if column.dtype.is_temporal():
        return given
    if not (column.dtype.is_numeric() or column.dtype == pl.Null):
        raise ValueError(
            f"column {column.name!r} of times has type {column.dtype}; write datetimes, ISO strings or numbers"
        )
    median: Any = _lenient(column).median()
    if median is None:  # no time at all: no row will be used
        return given or "s"
    unit = next((u for u in reversed(_MIN_TIMES) if abs(median) >= _MIN_TIMES[u]), None)
    if given:
        if unit and unit != given:
            notes.assume(
                f"times in {column.name} are in {given}, as schema.time_unit says; their size is that of {unit}"
            )
        return given
    if unit is None:
        is_day = 19_000_101 <= median <= 21_001_231
        fix = "write days as 2024-05-02" if is_day else "name schema.time_unit, s, ms, us or ns"
        raise ValueError(
            f"column {column.name!r} of times has a median of {median:.9g}, which is a date in no unit; {fix}"
        )
    notes.assume(f"times in {column.name} are in {unit}, by their size")
    return unit


def _are_numbers(column: pl.Series) -> bool:
    """Return whether most texts are whole numbers."""
    return 2 * column.cast(pl.Int64, strict=False).null_count() <= len(column) + column.null_count()


def times(column: pl.Series, schema: Schema, notes: Notes, start: int = 0) -> pl.Series:
    """Return times as Int64 milliseconds since 1970 (UTC); arguments as of `clean`.

    Raises:
      ValueError: for times that cannot be read, naming the first.
    """
    if column.dtype == pl.String:
        if not _are_numbers(column):
            return _parsed(column, schema, notes, start)
        whole = column.cast(pl.Int64, strict=False)
        if (wrong := whole.is_null() & column.is_not_null()).any():
            raise ValueError(
                f"column {column.name!r} of times has {first(column, wrong, start)}; write all times as numbers"
            )
        column = whole
    if column.dtype.is_temporal():
        return _milliseconds(column, schema, notes)
    value, unit = numbers(column, start), str(schema.time_unit)
    if column.dtype.is_integer():  # exact
        return (
            column.cast(pl.Int64) * int(TIME_UNITS[unit])
            if TIME_UNITS[unit] >= 1
            else (column.cast(pl.Int64) // round(1 / TIME_UNITS[unit]))
        )
    return (value * TIME_UNITS[unit]).round(0).cast(pl.Int64)


def _parsed(column: pl.Series, schema: Schema, notes: Notes, start: int) -> pl.Series:
    """Return ISO strings as Int64 milliseconds; each names its zone or is of the schema's."""
    text = column.str.strip_chars().str.replace("T", " ", literal=True).str.replace(r" ?(Z|UTC)$", "+00:00")
    zoned = text.str.contains(r"[+-]\d\d:?\d\d$")
    if text.count() and (text.str.len_chars() == len("2024-05-02")).all():
        _assume_midnight(column.name, notes)
    found = pl.Series(column.name, [None] * len(text), pl.Int64)
    for forms, rows, zone in ((_ISO_ZONED, zoned, "UTC"), (_ISO, ~zoned, None)):
        some = pl.select(pl.when(rows).then(text)).to_series()
        if some.null_count() == len(some):
            continue
        when = pl.Series([None] * len(text), dtype=pl.Datetime("us", zone))
        for form in forms:
            if when.null_count() > some.null_count():
                more = some.str.to_datetime(form, strict=False, time_unit="us", time_zone=zone)
                when = pl.select(pl.coalesce(when, more)).to_series()
        wrong = when.is_null() & some.is_not_null()
        if wrong.any():
            raise ValueError(
                f"column {column.name!r} of times has {first(column, wrong, start)}; write ISO times such as "
                "2024-05-02T18:30:00Z"
            )
        found = pl.select(pl.coalesce(found, _milliseconds(when.rename(column.name), schema, notes))).to_series()
    return found.rename(column.name)


def _assume_midnight(name: str, notes: Notes) -> None:
    notes.assume(f"{name} has days without a time; each is midnight, so sessions last a day")


def _milliseconds(column: pl.Series, schema: Schema, notes: Notes) -> pl.Series:
    if column.dtype == pl.Date:
        _assume_midnight(column.name, notes)
        column = column.cast(pl.Datetime("us"))
    if not isinstance(column.dtype, pl.Datetime):
        raise ValueError(f"column {column.name!r} of times has type {column.dtype}; write datetimes")
    if column.dtype.time_zone is None:
        if schema.time_zone == "UTC":
            notes.assume(f"times in {column.name} name no zone and are read as UTC")
        column = column.dt.replace_time_zone(schema.time_zone, ambiguous="earliest", non_existent="null")
    return column.dt.epoch("ms")


def dates(column: pl.Series) -> pl.Series:
    """Return days as Int32 such as 20240502, from dates, datetimes, texts such as 2024-05-02, or such integers.

    NaN and blank texts are null; whole floats are integers.

    Raises:
      ValueError: for another type or value.
    """
    if column.dtype.is_float():  # integers with empty cells, as pandas holds them
        column = column.fill_nan(None)
    elif column.dtype == pl.String:
        column = ids(column)
    elif column.dtype == pl.Null:
        column = column.cast(pl.Date)
    found = column
    if column.dtype.is_numeric():
        found = column.cast(pl.String).str.strip_suffix(".0").str.to_date("%Y%m%d", strict=False)
    elif column.dtype == pl.String:
        found = column.str.slice(0, 10).str.to_date("%Y-%m-%d", strict=False)
    elif not column.dtype.is_temporal() or column.dtype in (pl.Time, pl.Duration):
        raise ValueError(f"column {column.name!r} of days has type {column.dtype}; write dates")
    if (wrong := found.is_null() & column.is_not_null()).any():
        raise ValueError(f"column {column.name!r} of days has {first(column, wrong)}; write days such as 2024-05-02")
    return found.dt.strftime("%Y%m%d").cast(pl.Int32)


def days(time: np.ndarray, zone: str) -> np.ndarray:
    """Return the days [n] int32, such as 20240502, of times [n] (ms) in a zone."""
    local = pl.Series(time).cast(pl.Datetime("ms", "UTC")).dt.convert_time_zone(zone)
    return (
        pl.select(local.dt.year() * 10_000 + local.dt.month().cast(pl.Int32) * 100 + local.dt.day())
        .to_series()
        .cast(pl.Int32)
        .to_numpy()
    )


def hours(time: np.ndarray, zone: str) -> np.ndarray:
    """Return the hours of the day [n], with fractions, of times [n] (ms) in a zone."""
    local = pl.Series(time).cast(pl.Datetime("ms", "UTC")).dt.convert_time_zone(zone)
    minutes = local.dt.hour().cast(pl.Float64) + local.dt.minute().cast(pl.Float64) / 60
    return (minutes + local.dt.second().cast(pl.Float64) / 3600).to_numpy()
