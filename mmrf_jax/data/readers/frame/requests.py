"""Rows of a log as requests and sessions: given by request ids and positions, or reconstructed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from mmrf_jax.data.readers.engine.build import ShownRows
from mmrf_jax.data.readers.engine.candidates import request_keys
from mmrf_jax.data.readers.engine.grouping import MINUTE_MS
from mmrf_jax.data.readers.frame.columns import ROW
from mmrf_jax.data.readers.frame.notes import Notes
from mmrf_jax.schema import Schema

DEFAULT_SLATE, MOST_SLATE = 6, 100


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """How rows are cut into training, validation and test.

    Attributes:
      by: `time` (ms) or `day` (such as 20240502), of the request of a row.
      bounds: two: the first times of validation and of test, or the last days of training and of validation.
    """

    by: str
    bounds: tuple[int, int]

    def of(self, time: np.ndarray, day: np.ndarray) -> np.ndarray:
        """Return the split [n] int8 of rows at times and on days [n]: 0 for training, 1 for validation, 2 for test."""
        if self.by == "time":
            return np.searchsorted(self.bounds, time, side="right").astype(np.int8)
        return np.searchsorted(self.bounds, day, side="left").astype(np.int8)


class SortedTimes:
    """The times of all rows of a log, sorted within pieces that need not be in memory."""

    def __init__(self, pieces: Sequence[np.ndarray]):
        """Store sorted pieces [n] int64, at least one row in all."""
        self._pieces = [piece for piece in pieces if len(piece)]
        self.number = sum(map(len, self._pieces))
        self.first = min(int(piece[0]) for piece in self._pieces)
        self.last = max(int(piece[-1]) for piece in self._pieces)

    def before(self, time: int) -> int:
        """Return the number of rows before a time."""
        return sum(int(np.searchsorted(piece, time, side="left")) for piece in self._pieces)

    def last_before(self, time: int) -> int | None:
        """Return the last time before a time; None if there is none."""
        at = [(piece, int(np.searchsorted(piece, time, side="left"))) for piece in self._pieces]
        return max((int(piece[i - 1]) for piece, i in at if i), default=None)

    def nth(self, n: int) -> int:
        """Return the time of row n, from 0, in the order of time."""
        low, high = self.first, self.last
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.before(middle) <= n else (low, middle - 1)
        return low


def cut_parts(times: SortedTimes, days: Mapping[int, int], schema: Schema) -> SplitRule:
    """Return where a log is cut into its parts.

    Args:
      times: of all rows.
      days: {day: rows}.
      schema: says how to split.

    Raises:
      ValueError: if no row is in the training or in the test part.
    """
    if isinstance(schema.split, int):
        dates = sorted(days)
        if len(dates) <= 2 * schema.split:
            raise ValueError(
                f"schema.split={schema.split} takes the last {2 * schema.split} days, the log has {len(dates)}; use "
                "fewer days, or shares such as (0.8, 0.1, 0.1)"
            )
        found = SplitRule("day", (dates[-2 * schema.split - 1], dates[-schema.split - 1]))
    elif isinstance(schema.split[0], str):
        first, second = (int(str(x).replace("-", "")) for x in schema.split)
        found = SplitRule("day", (first, second))
    else:
        train, valid, _ = (float(x) for x in schema.split)
        first, second = (times.nth(min(int(times.number * x), times.number - 1)) for x in (train, train + valid))
        found = SplitRule("time", (first, second))
    if found.by == "time":
        trained, tested = times.before(found.bounds[0]), times.number - times.before(found.bounds[1])
    else:
        trained = sum(rows for day, rows in days.items() if day <= found.bounds[0])
        tested = sum(rows for day, rows in days.items() if day > found.bounds[1])
    for rows, name in ((trained, "training"), (tested, "test")):
        if not rows:
            raise ValueError(
                f"no row is in the {name} part: schema.split={schema.split!r}, and the log has days {min(days)} to "
                f"{max(days)}; change schema.split"
            )
    return found


def order_rows(frame: pl.DataFrame, schema: Schema, notes: Notes) -> pl.DataFrame:
    """Sort all rows of some users by user, request and place, without repeated items.

    Returns:
      The rows with the times of their requests, `asked` and `ended`.

    Raises:
      ValueError: for a request id that belongs to two users or comes back later.
    """
    if not schema.request:
        place = ["position"] if schema.position else []
        notes.assume(
            "requests are reconstructed: consecutive rows of a user within a session, up to slate_size different items"
            + (", a new one where position does not rise" if place else "; no row says which were shown together")
        )
        return frame.with_columns(asked=pl.col("time"), ended=pl.col("time")).sort(["user", "time", *place, ROW])
    of_request = frame.group_by("request").agg(
        pl.col("user").n_unique().alias("users"),
        (pl.col("time").max() - pl.col("time").min()).alias("span"),
        pl.col(ROW).first().alias("first"),
        pl.col(ROW).last().alias("last"),
    )
    check_users(of_request, schema)
    late = pl.col("span") > schema.session_gap * MINUTE_MS
    _refuse(of_request.filter(late), "comes again after more than schema.session_gap minutes", schema)
    time = pl.col("time")
    frame = frame.with_columns(
        asked=time.min().over("request"), ended=time.max().over("request"), __first=pl.col(ROW).min().over("request")
    )
    if not schema.position:
        notes.assume("items of a request are in the order of time, then of rows: schema.position is not given")
    frame = frame.sort(["user", "asked", "__first", "position" if schema.position else "time", ROW]).drop("__first")
    once = frame.unique(["request", "item"], keep="first", maintain_order=True)
    notes.leave_out("item repeated in a request", len(frame) - len(once))
    return once


def check_users(of_request: pl.DataFrame, schema: Schema) -> None:
    """Raise ValueError for a request of several `users`; `first` and `last` are rows of it."""
    _refuse(of_request.filter(pl.col("users") > 1), "belongs to several users", schema)


def _refuse(found: pl.DataFrame, fault: str, schema: Schema) -> None:
    """Raise ValueError for the first of some requests."""
    if len(found):
        one = found.sort("first").row(0, named=True)
        raise ValueError(
            f"column {schema.request!r}: request {one['request']!r} {fault} (rows {one['first']} and {one['last']}; "
            f"{len(found):,} such requests); give each request an id that no other has"
        )


def starts_of_requests(frame: pl.DataFrame, schema: Schema) -> np.ndarray:
    """Return where a given request starts [n] bool; anywhere, if none is given."""
    return _starts(frame["request"])[: len(frame)] if schema.request else np.ones(len(frame), bool)


def limit_slates(frame: pl.DataFrame, schema: Schema, notes: Notes) -> pl.DataFrame:
    """Leave out the rows past the largest slate of a given request."""
    if not schema.request:
        return frame
    most = schema.slate_size or MOST_SLATE
    over = _places(frame["request"]) >= most
    notes.leave_out(f"past the {most} first items of a request", int(over.sum()))
    return frame.filter(pl.Series(~over)) if over.any() else frame


def arrange_rows(frame: pl.DataFrame, user: np.ndarray, item: np.ndarray, schema: Schema) -> ShownRows:
    """Return ordered rows [n] as arrays; `user` and `item` [n] are rows of the tables."""
    signals, asked = [f"s{i}" for i in range(len(schema.signals))], frame["asked"].to_numpy()
    random = frame["random"].to_numpy() if schema.random else np.zeros(len(frame), bool)
    run = np.zeros(len(frame), np.int64)
    if schema.request:
        run = frame["request"].rle_id().to_numpy().astype(np.int64)
    else:  # random rows between others separate no requests
        run[~random] = np.cumsum(_separate(frame.filter(~random) if schema.random else frame, schema))
    return ShownRows(
        user=user,
        item=item,
        time=asked,
        day=frame["day"].to_numpy(),
        feedback=frame.select(signals).to_numpy().astype(np.float32).reshape(len(frame), len(signals)),
        key=request_keys(0, user, asked, item),
        ended=frame["ended"].to_numpy(),
        run=run,
        random=random,
        requested=schema.request is not None,
    )


def _separate(frame: pl.DataFrame, schema: Schema) -> np.ndarray:
    """Return where rows [n] cannot be in the request of the row before, by place or by `schema.request_by`."""
    found = np.zeros(len(frame), bool)
    if schema.position:
        position = frame["position"].fill_null(np.inf).to_numpy()
        found[1:] |= position[1:] <= position[:-1]
    for i in range(len(schema.request_by)):
        found |= _starts(frame[f"r{i}"])[: len(frame)]
    return found


def slate_extent(frame: pl.DataFrame, schema: Schema) -> tuple[float, float]:
    """Return the least and the largest number that decide K: items of a request, or positions; (0, 0) for neither."""
    if schema.request:
        return 0, int(_places(frame["request"]).max(initial=0)) + 1
    if schema.position and (known := frame["position"].drop_nulls()).len():
        return float(known.min()), float(known.max())  # type: ignore[arg-type]
    return 0, 0


def largest_slate(extents: Sequence[tuple[float, float]], schema: Schema, notes: Notes) -> int:
    """Return K: as the schema says, or the most items of a request; `extents` are those of all parts of the log."""
    if schema.slate_size:
        return schema.slate_size
    low, high = min(low for low, _ in extents), max(high for _, high in extents)
    found, why = DEFAULT_SLATE, "the default"
    if schema.request or schema.position:
        found, why = int(high - low) + (0 if schema.request else 1), "the most items of a request"
    found = min(max(found, 1), MOST_SLATE)
    notes.assume(f"slate_size={found}, {why}")
    return found


def _starts(column: pl.Series) -> np.ndarray:
    """Return where a value [n] differs from the one before."""
    run = column.rle_id().to_numpy()
    return np.append(True, run[1:] != run[:-1])


def _places(column: pl.Series) -> np.ndarray:
    """Return each row's place [n] in its run of equal values."""
    first = np.flatnonzero(_starts(column))
    return np.arange(len(column)) - np.repeat(first, np.diff(np.append(first, len(column))))
