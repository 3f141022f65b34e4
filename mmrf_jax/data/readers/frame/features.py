"""Features of items and users from the columns of any table: types are inferred, and all is fitted on training rows.

A number, flag or date is one standardised column (heavy-tailed counts after log1p); a category is one-hot over its most
frequent values and "other"; a list of categories likewise, with several ones; a vector of numbers is standardised by
dimension. Empty cells are zeros, the average.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import polars as pl

from mmrf_jax.data.readers.frame.notes import Notes

MAX_ONE_HOT = 32
_HEAVY_TAIL = 1.0  # standard deviations over mean, above which counts enter as log1p
_DAY_MS = 86_400_000


@dataclasses.dataclass(frozen=True)
class ColumnEncoder:
    """How a column becomes features.

    Attributes:
      name: of the column.
      kind: `number`, `date`, `category`, `categories` or `vector`.
      mean, std: [width] of numbers, dates and vectors.
      log: whether numbers enter as log1p.
      vocabulary: values of a category, one feature each; any other value is one more feature.
    """

    name: str
    kind: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    log: bool = False
    vocabulary: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """The number of features."""
        return len(self.mean) if self.kind in ("number", "date", "vector") else len(self.vocabulary) + 1

    def encode(self, column: pl.Series) -> np.ndarray:
        """Encode a column as features [n, width] float32."""
        if self.kind in ("category", "categories"):
            return self._one_hot(column)
        values = _values(column, self.kind)
        if self.kind == "vector" and values.shape[1] != self.width:
            raise ValueError(f"column {self.name!r} has vectors of {values.shape[1]} numbers, not {self.width}")
        values = np.log1p(np.maximum(values, 0.0)) if self.log else values
        return np.nan_to_num((values - np.array(self.mean)) / np.array(self.std)).astype(np.float32)

    def _one_hot(self, column: pl.Series) -> np.ndarray:
        lists = column if self.kind == "categories" else column.cast(pl.String).reshape((-1, 1)).arr.to_list()
        rows = np.repeat(np.arange(len(lists)), lists.list.len().fill_null(0).to_numpy())
        flat = lists.drop_nulls().explode(empty_as_null=False, keep_nulls=True).cast(pl.String)
        known = pl.DataFrame({"value": list(self.vocabulary)}, {"value": pl.String}).with_row_index("place")
        place = pl.DataFrame({"value": flat}).join(known, "value", "left", maintain_order="left")["place"]
        there = flat.is_not_null().to_numpy()
        out = np.zeros((len(column), self.width), np.float32)
        out[rows[there], place.fill_null(len(self.vocabulary)).to_numpy()[there]] = 1.0
        return out


def fit_encoders(
    frame: pl.DataFrame, names: list[str], in_train: np.ndarray, notes: Notes, what: str
) -> list[ColumnEncoder]:
    """Fit encoders of columns on the rows `in_train` [n] bool; names the columns that cannot be features."""
    found = []
    for name in names:
        made = _fit(prepared(frame[name]), in_train)
        if isinstance(made, str):
            notes.assume(f"{what} column {name} is no feature: {made}")
        else:
            found.append(made)
    return found


def encode_table(frame: pl.DataFrame, encoders: list[ColumnEncoder]) -> np.ndarray:
    """Encode a table as features [n, D] float32.

    Raises:
      ValueError: for a missing column.
    """
    parts = [np.zeros((len(frame), 0), np.float32)]
    for encoder in encoders:
        if encoder.name not in frame.columns:
            raise ValueError(f"the table has no column {encoder.name!r}, which the features need; add it")
        parts.append(encoder.encode(prepared(frame[encoder.name])))
    return np.concatenate(parts, axis=1)


def prepared(column: pl.Series) -> pl.Series:
    """Return a column with JSON lists parsed and arrays as lists."""
    if isinstance(column.dtype, pl.Array):
        return column.arr.to_list()
    if column.dtype == pl.String:
        some = next(iter(column.drop_nulls().head(1)), "")
        if some.startswith("[") and some.endswith("]"):
            inner = pl.String if '"' in some else pl.Float64
            return column.str.json_decode(pl.List(inner), infer_schema_length=None)
    return column


def _fit(column: pl.Series, in_train: np.ndarray) -> ColumnEncoder | str:
    name, kind, train = column.name, column.dtype, column.filter(pl.Series(in_train))
    if not train.is_not_null().any():
        return "it is empty in the training days"
    if isinstance(kind, pl.List):
        inner = kind.inner
        if isinstance(inner, pl.DataType) and inner.is_float():
            shortest, longest = _lengths(column)
            if shortest != longest:
                return f"its vectors have {shortest} to {longest} numbers"
            return _standardised(name, "vector", _values(train, "vector"), longest)
        tokens = train.explode(empty_as_null=False, keep_nulls=False).cast(pl.String)
        return ColumnEncoder(name, "categories", vocabulary=_frequent(tokens))
    if kind.is_numeric() or kind == pl.Boolean:
        values = _values(train, "number")
        positive = values[np.isfinite(values)]
        log = bool(len(positive) and positive.min() >= 0 and positive.std() > _HEAVY_TAIL * positive.mean() > 0)
        return dataclasses.replace(_standardised(name, "number", np.log1p(values) if log else values, 1), log=log)
    if kind.is_temporal() and kind != pl.Time:
        return _standardised(name, "date", _values(train, "date"), 1)
    if kind == pl.String or isinstance(kind, pl.Categorical | pl.Enum):
        texts = train.cast(pl.String).drop_nulls()
        if (different := texts.n_unique()) > max(MAX_ONE_HOT, len(texts) // 2):
            return f"{different:,} different texts of {len(texts):,}"
        return ColumnEncoder(name, "category", vocabulary=_frequent(texts))
    return f"its type is {kind}"


def _frequent(texts: pl.Series) -> tuple[str, ...]:
    """Return the most frequent values, ties in alphabetical order."""
    counted = pl.DataFrame({"value": texts}).drop_nulls().group_by("value").len()
    return tuple(counted.sort(["len", "value"], descending=[True, False]).head(MAX_ONE_HOT)["value"])


def _lengths(column: pl.Series) -> tuple[int, int]:
    """Return the lengths of the shortest and of the longest list."""
    lengths: Any = column.drop_nulls().list.len()
    return int(lengths.min() or 0), int(lengths.max() or 0)


def _values(column: pl.Series, kind: str) -> np.ndarray:
    """Return numbers [n, width] float64, NaN where there is no finite one; dates in days."""
    if kind == "vector":
        shortest, width = _lengths(column)
        out = np.full((len(column), width), np.nan)
        there = column.is_not_null().to_numpy()
        if shortest != width:
            raise ValueError(f"column {column.name!r} has vectors of {shortest} to {width} numbers; use one length")
        flat = column.drop_nulls().explode(empty_as_null=False, keep_nulls=True).cast(pl.Float64)
        out[there] = flat.fill_null(np.nan).to_numpy().reshape(-1, width)
        return np.where(np.isfinite(out), out, np.nan)
    if kind == "date":
        column = column.cast(pl.Datetime("ms")).dt.epoch("ms") / _DAY_MS
    found = column.cast(pl.Float64).fill_null(np.nan).to_numpy()[:, None]
    return np.where(np.isfinite(found), found, np.nan)


def _standardised(name: str, kind: str, values: np.ndarray, width: int) -> ColumnEncoder:
    finite = np.where(np.isfinite(values), values, np.nan)
    known = np.isfinite(finite).any(axis=0)
    mean = np.where(known, np.nanmean(np.where(known, finite, 0.0), axis=0), 0.0)
    std = np.where(known, np.nanstd(np.where(known, finite, 0.0), axis=0), 1.0)
    std = np.where(std > 1e-6, std, 1.0)
    assert len(mean) == width
    return ColumnEncoder(name, kind, tuple(mean.tolist()), tuple(std.tolist()))
