"""Cells of a column as ids, lists of ids, or numbers; one that is neither is an error that names its column and row."""

from __future__ import annotations

import polars as pl


def first_wrong(column: pl.Series, wrong: pl.Series, start: int = 0) -> str:
    """Return the first wrong value of a column and its row, in words; `start` is the number of the first row."""
    at = wrong.fill_null(False).arg_true()[0]
    return f"{column[at]!r} in row {start + at}"


def to_ids(column: pl.Series, start: int = 0) -> pl.Series:
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
            f"column {column.name!r} of ids has {first_wrong(column, wrong, start)}; write ids as integers or strings"
        )
    if kind == pl.Null:
        return column.cast(pl.String)
    raise ValueError(f"column {column.name!r} of ids has type {kind}; write ids as integers or strings")


def to_id_lists(column: pl.Series) -> pl.Series:
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
    flat = to_ids(column.drop_nulls().explode(empty_as_null=False, keep_nulls=True).rename(column.name))
    found = column.cast(pl.List(flat.dtype), strict=False)
    if flat.null_count():
        if flat.dtype == pl.String:
            found = found.list.eval(pl.element().filter(pl.element().str.strip_chars() != ""))
        found = found.list.drop_nulls()
    if (found.list.n_unique() < found.list.len()).any():
        found = found.list.unique(maintain_order=True)
    return found


def to_numbers(column: pl.Series, start: int = 0) -> pl.Series:
    """Return numbers as Float64; NaN and empty text are null.

    Raises:
      ValueError: for another type, or an infinite value.
    """
    if column.dtype == pl.String:
        text = column.str.strip_chars()
        parsed = text.cast(pl.Float64, strict=False)
        wrong = parsed.is_null() & (text != "")
        if wrong.any():
            raise ValueError(f"column {column.name!r} has {first_wrong(column, wrong, start)}; write numbers")
        column = parsed
    if isinstance(column.dtype, pl.Duration):
        return column.dt.total_microseconds() / 1e6
    if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
        raise ValueError(f"column {column.name!r} has type {column.dtype}; write numbers")
    found = column.cast(pl.Float64).fill_nan(None)
    if found.is_infinite().any():
        raise ValueError(
            f"column {column.name!r} has {first_wrong(column, found.is_infinite(), start)}; write finite numbers"
        )
    return found


def lenient_numbers(column: pl.Series) -> pl.Series:
    """Return numbers as Float64, null where there is none; `to_numbers` refuses them, with their rows."""
    if not (column.dtype.is_numeric() or column.dtype in (pl.String, pl.Boolean, pl.Null)):
        return pl.Series(column.name, [], pl.Float64)
    return column.cast(pl.Float64, strict=False).fill_nan(None)
