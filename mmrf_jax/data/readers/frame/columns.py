"""The columns of a log as typed columns: ids, times, signals and propensities, each checked against the schema.

A value that cannot be (a like of 7, a propensity of 1.2) is an error that names its column and row. A row without user,
item, time or main signal, or a repeated one, is left out and counted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import polars as pl

from mmrf_jax.data.readers.frame import cells, datetimes
from mmrf_jax.data.readers.frame.notes import Notes
from mmrf_jax.schema import Schema
from mmrf_jax.signals import UNITS, Signal

ROW = "__row"  # number of a row in the given table, from 0
_SHORTEST_MEDIAN, _LONGEST_MEDIAN = 0.05, 3_600.0  # seconds of plausible feedback
_LONGEST_ITEM = 14_400.0  # median seconds of plausible items


def resolve_units(rows: pl.DataFrame, schema: Schema, notes: Notes) -> Schema:
    """Return the schema with the units that it leaves open, as some rows of the log have them.

    Raises:
      ValueError: if most values cannot be in the unit that they should be in.
    """
    units: dict[str, Any] = {"time_unit": datetimes.infer_unit(rows[schema.time], schema.time_unit, notes)}
    if schema.duration and schema.duration in rows.columns:
        units["duration_unit"] = duration_unit(rows[schema.duration], schema, notes)
        check_durations(rows[schema.duration], units["duration_unit"])
    longest = _LONGEST_ITEM if schema.duration else _LONGEST_MEDIAN
    for signal in schema.signals:
        column = rows[signal.column or signal.name]
        if signal.kind == "duration" and not isinstance(column.dtype, pl.Duration):
            said = f"column {column.name!r} of the duration signal {signal.name!r} with unit={signal.unit!r}"
            other = "" if schema.duration else "; or name schema.duration if the items are so long"
            _check_unit(cells.lenient_numbers(column) * UNITS[signal.unit], said, longest, "unit", other)
    return dataclasses.replace(schema, **units)


def usable_rows(log: pl.DataFrame, schema: Schema, notes: Notes, start: int = 0) -> pl.DataFrame:
    """Return the usable rows of a piece of a log with typed columns.

    Args:
      log: consecutive rows.
      schema: with units, see `resolve_units`.
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
    columns: dict[str, pl.Series] = {role: cells.to_ids(log[roles[role]], start) for role in ("user", "item")}
    columns["time"] = datetimes.to_milliseconds(log[schema.time], schema, notes, start)
    if schema.request:
        columns["request"] = cells.to_ids(log[schema.request], start)
    if schema.position:
        columns["position"] = cells.to_numbers(log[schema.position], start)
    if schema.propensity:
        columns["propensity"] = _propensities(log[schema.propensity], start)
    if schema.candidates and schema.candidates in log.columns:
        columns["candidates"] = cells.to_id_lists(log[schema.candidates])
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


def _signal(column: pl.Series, signal: Signal, start: int) -> pl.Series:
    """Return a signal as Float32; durations in seconds."""
    of = f"column {column.name!r} of the {signal.kind} signal {signal.name!r}"
    if signal.kind == "binary" and column.dtype == pl.String:
        text = column.str.strip_chars().str.to_lowercase().replace({"true": "1", "false": "0"})
        if (unknown := text.cast(pl.Float64, strict=False).is_null() & (text != "")).any():
            raise ValueError(f"{of} has {cells.first_wrong(column, unknown, start)}; write 0 or 1, or true or false")
        column = text.rename(column.name)
    was_duration = isinstance(column.dtype, pl.Duration)
    found = cells.to_numbers(column, start)
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
        raise ValueError(f"{of} has {cells.first_wrong(column, wrong, start)}; {advice}")
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
    found = cells.to_numbers(column, start)
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
        _check_unit(cells.lenient_numbers(column) * UNITS[str(unit)], said, _LONGEST_ITEM, "schema.duration_unit")


def _propensities(column: pl.Series, start: int) -> pl.Series:
    found = cells.to_numbers(column, start)
    wrong = (found <= 0) | (found > 1)
    if wrong.any():
        raise ValueError(
            f"column {column.name!r} of propensities has {cells.first_wrong(column, wrong, start)}; write "
            "probabilities above 0, at most 1"
        )
    return found
