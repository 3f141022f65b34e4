"""Rows of a log as requests and sessions: given by request ids and positions, or reconstructed."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl

from mmrf_jax.data.readers.frame.columns import ROW, Notes
from mmrf_jax.data.readers.kuairand.requests import MINUTE_MS, request_starts
from mmrf_jax.schema import Schema

DEFAULT_SLATE, MOST_SLATE = 6, 100


@dataclasses.dataclass
class Rows:
    """Shown items, sorted by user, time and place, as arrays [n]; and where sessions and requests start."""

    user: np.ndarray  # int32 row of the user table
    item: np.ndarray  # int32 row of the item table
    time: np.ndarray  # int64, ms
    split: np.ndarray  # int8: 0 train, 1 valid, 2 test
    feedback: np.ndarray  # [n, S] float32
    propensity: np.ndarray | None  # float64
    session_start: np.ndarray  # bool
    request_start: np.ndarray  # bool
    frame: pl.DataFrame  # the same rows

    def __len__(self) -> int:
        return len(self.user)


def cut(time: np.ndarray, day: np.ndarray, schema: Schema) -> np.ndarray:
    """Return the split [n] int8 of rows: 0 for training, 1 for validation, 2 for test.

    Args:
      time: [n] of the row's request.
      day: [n] of the same, such as 20240502.
      schema: says how to split.

    Raises:
      ValueError: if no row is in the training or in the test part.
    """
    if isinstance(schema.split, int):
        dates = np.unique(day)
        if len(dates) <= 2 * schema.split:
            raise ValueError(
                f"schema.split={schema.split} takes the last {2 * schema.split} days, the log has {len(dates)}; use "
                "fewer days, or shares such as (0.8, 0.1, 0.1)"
            )
        bounds = [dates[-2 * schema.split - 1], dates[-schema.split - 1]]
        split = np.searchsorted(bounds, day, side="left")
    elif isinstance(schema.split[0], str):
        bounds = [int(str(x).replace("-", "")) for x in schema.split]
        split = np.searchsorted(bounds, day, side="left")
    else:
        train, valid, _ = (float(x) for x in schema.split)
        ordered = np.sort(time)
        last = [ordered[min(int(len(time) * share), len(time) - 1)] for share in (train, train + valid)]
        split = np.searchsorted(last, time, side="right")
    for number, name in ((0, "training"), (2, "test")):
        if not (split == number).any():
            raise ValueError(
                f"no row is in the {name} part: schema.split={schema.split!r}, and the log has days {day.min()} to "
                f"{day.max()}; change schema.split"
            )
    return split.astype(np.int8)


def order(frame: pl.DataFrame, schema: Schema, notes: Notes) -> pl.DataFrame:
    """Sort rows by user, request and place, without repeated items; `asked` and `ended` are the times of their request.

    Raises:
      ValueError: for a request id that belongs to two users or comes back later.
    """
    if not schema.request:
        place = ["position"] if schema.position else []
        notes.assumed.append(
            "requests are reconstructed: consecutive rows of a user within a session, up to slate_size different items"
            + (", a new one where position does not rise" if place else "; no row says which were shown together")
        )
        return frame.with_columns(asked=pl.col("time"), ended=pl.col("time")).sort(["user", "time", *place, ROW])
    of_request = frame.group_by("request").agg(
        pl.col("user").n_unique().alias("users"),
        (pl.col("time").max() - pl.col("time").min()).alias("span"),
        pl.col(ROW).first().alias("first_row"),
        pl.col(ROW).last().alias("last_row"),
    )
    for wrong, fault in (
        (pl.col("users") > 1, "belongs to several users"),
        (pl.col("span") > schema.session_gap * MINUTE_MS, "comes again after more than schema.session_gap minutes"),
    ):
        found = of_request.filter(wrong).sort("first_row")
        if len(found):
            one = found.row(0, named=True)
            raise ValueError(
                f"column {schema.request!r}: request {one['request']!r} {fault} (rows {one['first_row']} and "
                f"{one['last_row']}; {len(found):,} such requests); give each request an id that no other has"
            )
    time = pl.col("time")
    frame = frame.with_columns(
        asked=time.min().over("request"), ended=time.max().over("request"), __first=pl.col(ROW).min().over("request")
    )
    if not schema.position:
        notes.assumed.append("items of a request are in the order of time, then of rows: schema.position is not given")
    frame = frame.sort(["user", "asked", "__first", "position" if schema.position else "time", ROW]).drop("__first")
    once = frame.unique(["request", "item"], keep="first", maintain_order=True)
    if len(once) < len(frame):
        notes.left_out["item repeated in a request"] = len(frame) - len(once)
    return once


def assemble(
    frame: pl.DataFrame,
    user: np.ndarray,
    item: np.ndarray,
    split: np.ndarray,
    slate: int,
    schema: Schema,
    notes: Notes,
) -> Rows:
    """Find the sessions and requests of ordered rows; rows past `slate` items of a given request are left out."""
    if schema.request and (over := _places(frame["request"]) >= slate).any():
        notes.left_out[f"past the {slate} first items of a request"] = int(over.sum())
        frame, user, item, split = frame.filter(pl.Series(~over)), user[~over], item[~over], split[~over]
    asked, ended = frame["asked"].to_numpy(), frame["ended"].to_numpy()
    session = np.ones(len(user), bool)
    away = asked[1:] - ended[:-1] > schema.session_gap * MINUTE_MS
    session[1:] = (user[1:] != user[:-1]) | (split[1:] != split[:-1]) | away
    if schema.request:
        request = _starts(frame["request"])
    else:
        run = np.zeros(len(user), np.int64)
        if schema.position:
            position = frame["position"].fill_null(np.inf).to_numpy()
            run[1:] = np.cumsum(position[1:] <= position[:-1])
        request = request_starts(session, item, run, asked, slate, schema.session_gap)
    signals = [f"s{i}" for i in range(len(schema.signals))]
    return Rows(
        user=user,
        item=item,
        time=asked,
        split=split,
        feedback=frame.select(signals).to_numpy().astype(np.float32).reshape(len(frame), len(signals)),
        propensity=propensities(frame, notes) if schema.propensity else None,
        session_start=session,
        request_start=request,
        frame=frame,
    )


def propensities(frame: pl.DataFrame, notes: Notes) -> np.ndarray | None:
    """Return the propensities [n] of rows; None if some are unknown."""
    if empty := frame["propensity"].null_count():
        notes.assumed.append(f"{empty:,} of {len(frame):,} propensities are empty: the behaviour policy is fitted")
        return None
    return frame["propensity"].to_numpy()


def largest(frame: pl.DataFrame, schema: Schema, notes: Notes) -> int:
    """Return K: as the schema says, or the most items of a request."""
    why = "the most items of a request"
    if schema.slate_size:
        return schema.slate_size
    if schema.request:
        found = min(int(frame.group_by("request").len()["len"].max() or 1), MOST_SLATE)  # type: ignore[arg-type]
    elif schema.position:
        position = frame["position"]
        found = min(max(int(position.max() - position.min()) + 1, 1), MOST_SLATE)  # type: ignore[operator, arg-type]
    else:
        found, why = DEFAULT_SLATE, "the default"
    notes.assumed.append(f"slate_size={found}, {why}")
    return found


def _starts(column: pl.Series) -> np.ndarray:
    """Return where a value [n] differs from the one before."""
    run = column.rle_id().to_numpy()
    return np.append(True, run[1:] != run[:-1])


def _places(column: pl.Series) -> np.ndarray:
    """Return each row's place [n] in its run of equal values."""
    first = np.flatnonzero(_starts(column))
    return np.arange(len(column)) - np.repeat(first, np.diff(np.append(first, len(column))))
