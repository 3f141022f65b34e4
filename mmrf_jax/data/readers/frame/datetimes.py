"""Columns of times and days, in whatever form, as milliseconds since 1970 (UTC), days and hours."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from mmrf_jax.data.readers.frame import cells
from mmrf_jax.data.readers.frame.notes import Notes
from mmrf_jax.schema import TIME_UNITS, Schema

_ISO = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
_ISO_ZONED = ("%Y-%m-%d %H:%M:%S%.f%:z", "%Y-%m-%d %H:%M:%S%.f%z", "%Y-%m-%d %H:%M%:z")
_MIN_TIMES = {"s": 1e8, "ms": 1e11, "us": 1e14, "ns": 1e17}  # of dates after 1973


def infer_unit(column: pl.Series, given: str | None, notes: Notes) -> str | None:
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
    median: Any = cells.lenient_numbers(column).median()
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


def to_milliseconds(column: pl.Series, schema: Schema, notes: Notes, start: int = 0) -> pl.Series:
    """Return times as Int64 milliseconds since 1970 (UTC); arguments as of `columns.usable_rows`.

    Raises:
      ValueError: for times that cannot be read, naming the first.
    """
    if column.dtype == pl.String:
        if not _are_numbers(column):
            return _of_texts(column, schema, notes, start)
        whole = column.cast(pl.Int64, strict=False)
        if (wrong := whole.is_null() & column.is_not_null()).any():
            raise ValueError(
                f"column {column.name!r} of times has {cells.first_wrong(column, wrong, start)}; write all times as "
                "numbers"
            )
        column = whole
    if column.dtype.is_temporal():
        return _of_datetimes(column, schema, notes)
    value, unit = cells.to_numbers(column, start), str(schema.time_unit)
    if column.dtype.is_integer():  # exact
        return (
            column.cast(pl.Int64) * int(TIME_UNITS[unit])
            if TIME_UNITS[unit] >= 1
            else (column.cast(pl.Int64) // round(1 / TIME_UNITS[unit]))
        )
    return (value * TIME_UNITS[unit]).round(0).cast(pl.Int64)


def _of_texts(column: pl.Series, schema: Schema, notes: Notes, start: int) -> pl.Series:
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
                f"column {column.name!r} of times has {cells.first_wrong(column, wrong, start)}; write ISO times such "
                "as 2024-05-02T18:30:00Z"
            )
        found = pl.select(pl.coalesce(found, _of_datetimes(when.rename(column.name), schema, notes))).to_series()
    return found.rename(column.name)


def _assume_midnight(name: str, notes: Notes) -> None:
    notes.assume(f"{name} has days without a time; each is midnight, so sessions last a day")


def _of_datetimes(column: pl.Series, schema: Schema, notes: Notes) -> pl.Series:
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


def to_days(column: pl.Series) -> pl.Series:
    """Return days as Int32 such as 20240502, from dates, datetimes, texts such as 2024-05-02, or such integers.

    NaN and blank texts are null; whole floats are integers.

    Raises:
      ValueError: for another type or value.
    """
    if column.dtype.is_float():  # integers with empty cells, as pandas holds them
        column = column.fill_nan(None)
    elif column.dtype == pl.String:
        column = cells.to_ids(column)
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
        raise ValueError(
            f"column {column.name!r} of days has {cells.first_wrong(column, wrong)}; write days such as 2024-05-02"
        )
    return found.dt.strftime("%Y%m%d").cast(pl.Int32)


def days_of(time: np.ndarray, zone: str) -> np.ndarray:
    """Return the days [n] int32, such as 20240502, of times [n] (ms) in a zone."""
    local = pl.Series(time).cast(pl.Datetime("ms", "UTC")).dt.convert_time_zone(zone)
    return (
        pl.select(local.dt.year() * 10_000 + local.dt.month().cast(pl.Int32) * 100 + local.dt.day())
        .to_series()
        .cast(pl.Int32)
        .to_numpy()
    )


def hours_of(time: np.ndarray, zone: str) -> np.ndarray:
    """Return the hours of the day [n], with fractions, of times [n] (ms) in a zone."""
    local = pl.Series(time).cast(pl.Datetime("ms", "UTC")).dt.convert_time_zone(zone)
    minutes = local.dt.hour().cast(pl.Float64) + local.dt.minute().cast(pl.Float64) / 60
    return (minutes + local.dt.second().cast(pl.Float64) / 3600).to_numpy()
