"""The columns of a log as arrays: ids, times, signals and propensities, each checked against the schema.

A value that cannot be (a like of 7, a propensity of 1.2) is an error that names its column and row. A row without user,
item, time or main signal, or a repeated one, is left out and counted.
"""

from __future__ import annotations

import dataclasses
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
    """What was assumed about a log, and how many rows were left out, by reason."""

    assumed: list[str] = dataclasses.field(default_factory=list)
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)

    def drop(self, frame: pl.DataFrame, unusable: pl.Expr, reason: str) -> pl.DataFrame:
        """Leave out rows and count them."""
        kept = frame.filter(~unusable.fill_null(True))
        if len(kept) < len(frame):
            self.left_out[reason] = self.left_out.get(reason, 0) + len(frame) - len(kept)
        return kept


def clean(log: pl.DataFrame, schema: Schema, notes: Notes) -> pl.DataFrame:
    """Return the usable rows of a log with typed columns.

    Returns:
      `user`, `item` and `request` (ids in their own type), `time` (Int64, ms), `position` (Float64), `propensity`
      (Float64), `candidates` (a list of ids), `duration` (Float64, seconds), `s0`, `s1`, … (Float32, the signals) and
      `__row`; without the columns that the schema does not name.

    Raises:
      ValueError: for a type that does not fit, or a value that cannot be.
    """
    roles = schema.columns()
    columns: dict[str, pl.Series] = {role: ids(log[roles[role]]) for role in ("user", "item")}
    columns["time"] = times(log[schema.time], schema, notes)
    if schema.request:
        columns["request"] = ids(log[schema.request])
    if schema.position:
        columns["position"] = numbers(log[schema.position])
    if schema.propensity:
        columns["propensity"] = _propensities(log[schema.propensity], notes)
    if schema.candidates and schema.candidates in log.columns:
        columns["candidates"] = id_lists(log[schema.candidates])
    if schema.duration and schema.duration in log.columns:
        columns["duration"] = durations(log[schema.duration], schema, notes)
    longest = _LONGEST_ITEM if schema.duration else _LONGEST_MEDIAN
    for i, signal in enumerate(schema.signals):
        columns[f"s{i}"] = _signal(log[signal.column or signal.name], signal, longest)
    frame = pl.DataFrame({name: column.rename(name) for name, column in columns.items()}).with_row_index(ROW)
    return _usable(frame, schema, notes)


def _usable(frame: pl.DataFrame, schema: Schema, notes: Notes) -> pl.DataFrame:
    for name in ("user", "item", "time", *(["request"] if schema.request else [])):
        frame = notes.drop(frame, pl.col(name).is_null(), f"no {name}")
    main = [signal.name for signal in schema.signals].index(str(schema.main))
    frame = notes.drop(frame, pl.col(f"s{main}").is_null(), f"no {schema.main}")
    for i, signal in enumerate(schema.signals):
        if empty := frame[f"s{i}"].null_count():
            notes.assumed.append(f"{empty:,} empty cells of {signal.name} are 0")
            frame = frame.with_columns(pl.col(f"s{i}").fill_null(0.0))
    same = [name for name in frame.columns if name not in (ROW, "candidates")]
    kept = frame.unique(same, keep="first", maintain_order=True)
    if len(kept) < len(frame):
        notes.left_out["repeated row"] = len(frame) - len(kept)
    return kept


def first(column: pl.Series, wrong: pl.Series) -> str:
    """Return the first wrong value of a column and its row, in words."""
    row = wrong.fill_null(False).arg_true()[0]
    return f"{column[row]!r} in row {row}"


def ids(column: pl.Series) -> pl.Series:
    """Return ids as Int64, UInt64 or String; empty strings are null.

    Raises:
      ValueError: for another type.
    """
    kind = column.dtype
    if kind.is_integer():
        return column if kind == pl.UInt64 else column.cast(pl.Int64)
    if isinstance(kind, pl.Categorical | pl.Enum):
        column, kind = column.cast(pl.String), pl.String()
    if kind == pl.String:
        return pl.select(pl.when(column != "").then(column)).to_series().rename(column.name)
    if kind.is_float():  # integers with empty cells, as pandas holds them
        wrong = (column != column.round(0)) | (column.abs() > 2.0**53)
        if not wrong.fill_null(False).any():
            return column.cast(pl.Int64)
        raise ValueError(f"column {column.name!r} of ids has {first(column, wrong)}; write ids as integers or strings")
    if kind == pl.Null:
        return column.cast(pl.String)
    raise ValueError(f"column {column.name!r} of ids has type {kind}; write ids as integers or strings")


def id_lists(column: pl.Series) -> pl.Series:
    """Return lists of ids, from a list column or from JSON such as `["a", "b"]`.

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
    inner = ids(column.explode(empty_as_null=True, keep_nulls=True).rename(column.name)).dtype
    return column.cast(pl.List(inner))


def numbers(column: pl.Series) -> pl.Series:
    """Return numbers as Float64; NaN is null.

    Raises:
      ValueError: for another type, or an infinite value.
    """
    if column.dtype == pl.String:
        parsed = column.cast(pl.Float64, strict=False)
        wrong = parsed.is_null() & column.is_not_null()
        if wrong.any():
            raise ValueError(f"column {column.name!r} has {first(column, wrong)}; write numbers")
        column = parsed
    if isinstance(column.dtype, pl.Duration):
        return column.dt.total_microseconds() / 1e6
    if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
        raise ValueError(f"column {column.name!r} has type {column.dtype}; write numbers")
    found = column.cast(pl.Float64).fill_nan(None)
    if found.is_infinite().any():
        raise ValueError(f"column {column.name!r} has {first(column, found.is_infinite())}; write finite numbers")
    return found


def _signal(column: pl.Series, signal: Signal, longest: float) -> pl.Series:
    """Return a signal as Float32; durations in seconds."""
    of = f"column {column.name!r} of the {signal.kind} signal {signal.name!r}"
    if signal.kind == "binary" and column.dtype == pl.String:
        column = column.str.to_lowercase().replace({"true": "1", "false": "0"}).rename(column.name)
    was_duration = isinstance(column.dtype, pl.Duration)
    found = numbers(column)
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
        raise ValueError(f"{of} has {first(column, wrong)}; {advice}")
    if signal.kind == "duration" and not was_duration:
        found = found * UNITS[signal.unit]
        _check_unit(found, f"{of} with unit={signal.unit!r}", longest)
    return found.cast(pl.Float32)


def _check_unit(seconds: pl.Series, of: str, longest: float) -> None:
    """Raise ValueError if the median of positive durations is implausible."""
    median: Any = seconds.filter(seconds > 0).median()
    if median is None or _SHORTEST_MEDIAN <= median <= longest:
        return
    advice = "a larger unit" if median < _SHORTEST_MEDIAN else "a smaller unit such as 'ms', or name schema.duration"
    raise ValueError(f"{of} has a median of {median:,.4g} s where it is not 0; choose {advice}")


def durations(column: pl.Series, schema: Schema, notes: Notes) -> pl.Series:
    """Return the items' lengths as Float64 seconds; null where there is none."""
    if isinstance(column.dtype, pl.Duration):
        return numbers(column)
    unit = schema.duration_unit
    if unit is None:
        unit = next((u for u in UNITS if column.name.lower().endswith(f"_{u}")), "s")
        notes.assumed.append(f"durations in {column.name} are in {unit}, by the column's name")
    found = numbers(column) * UNITS[unit]
    _check_unit(found, f"column {column.name!r} of durations with duration_unit={unit!r}", _LONGEST_ITEM)
    return found


def _propensities(column: pl.Series, notes: Notes) -> pl.Series:
    found = numbers(column)
    wrong = (found <= 0) | (found > 1)
    if wrong.any():
        raise ValueError(
            f"column {column.name!r} of propensities has {first(column, wrong)}; write probabilities above 0, at most 1"
        )
    return found


def times(column: pl.Series, schema: Schema, notes: Notes) -> pl.Series:
    """Return times as Int64 milliseconds since 1970 (UTC).

    Raises:
      ValueError: for times that cannot be read, naming the first.
    """
    if column.dtype == pl.String:
        whole = column.cast(pl.Int64, strict=False)
        if 2 * whole.null_count() > len(column) + column.null_count():
            return _milliseconds(_parsed(column, schema), schema, notes)
        if (wrong := whole.is_null() & column.is_not_null()).any():
            raise ValueError(f"column {column.name!r} of times has {first(column, wrong)}; write all times as numbers")
        column = whole
    if column.dtype.is_temporal():
        return _milliseconds(column, schema, notes)
    value = numbers(column)
    unit = schema.time_unit
    if unit is None:
        middle = abs(float(value.median() or 0.0))  # type: ignore[arg-type]
        unit = next((u for u in reversed(_MIN_TIMES) if middle >= _MIN_TIMES[u]), None)
        if unit is None:
            raise ValueError(
                f"column {column.name!r} of times has a median of {middle:g}, which is a date in no unit; name "
                "schema.time_unit, s, ms, us or ns"
            )
        notes.assumed.append(f"times in {column.name} are in {unit}, by their size")
    if column.dtype.is_integer():  # exact
        return (
            column.cast(pl.Int64) * int(TIME_UNITS[unit])
            if TIME_UNITS[unit] >= 1
            else (column.cast(pl.Int64) // round(1 / TIME_UNITS[unit]))
        )
    return (value * TIME_UNITS[unit]).round(0).cast(pl.Int64)


def _parsed(column: pl.Series, schema: Schema) -> pl.Series:
    """Return ISO strings as datetimes."""
    text = column.str.strip_chars().str.replace("T", " ", literal=True).str.replace(r" ?(Z|UTC)$", "+00:00")
    zoned = bool(text.str.contains(r"[+-]\d\d:?\d\d$").any())
    found = pl.Series(column.name, [None] * len(text), pl.Datetime("us", "UTC" if zoned else None))
    for form in _ISO_ZONED if zoned else _ISO:
        if found.null_count() > text.null_count():
            more = text.str.to_datetime(form, strict=False, time_unit="us", time_zone="UTC" if zoned else None)
            found = pl.select(pl.coalesce(found, more)).to_series().rename(column.name)
    rest = found.is_null() & text.is_not_null()
    if rest.any():
        raise ValueError(
            f"column {column.name!r} of times has {first(column, rest)}; write ISO times such as 2024-05-02T18:30:00Z"
        )
    return found


def _milliseconds(column: pl.Series, schema: Schema, notes: Notes) -> pl.Series:
    if column.dtype == pl.Date:
        notes.assumed.append(f"{column.name} has days without a time; each is midnight, so sessions last a day")
        column = column.cast(pl.Datetime("us"))
    if not isinstance(column.dtype, pl.Datetime):
        raise ValueError(f"column {column.name!r} of times has type {column.dtype}; write datetimes")
    if column.dtype.time_zone is None:
        if schema.time_zone == "UTC":
            notes.assumed.append(f"times in {column.name} name no zone and are read as UTC")
        column = column.dt.replace_time_zone(schema.time_zone, ambiguous="earliest", non_existent="null")
    return column.dt.epoch("ms")


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
