"""The tables of items and users: ids, vocabularies and features, all fitted on the training part."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import numpy as np
import polars as pl

from mmrf_jax import types
from mmrf_jax.data.readers.frame import cells, columns, features, tables
from mmrf_jax.data.readers.frame.notes import Notes
from mmrf_jax.schema import Schema


def table_with_ids(
    table: pl.DataFrame | None, name: str, used: pl.Series, what: str, notes: Notes, listed: pl.Series | None = None
) -> tuple[pl.DataFrame | None, np.ndarray]:
    """Return a table of items or users with its ids, once each, and all ids in order: row 0 is an unknown one.

    Args:
      table: as given; None for none.
      name: the column of its ids.
      used: the different ids of the log.
      what: `item` or `user`.
      notes: takes what is assumed and left out.
      listed: the different ids of the candidates.

    Raises:
      ValueError: for ids of several types.
    """
    every = [used]
    if table is not None:
        tables.check_names(table.columns, {what: name}, f"{what} table")
        known = cells.to_ids(table[name])
        if known.dtype != used.dtype:
            raise ValueError(
                f"column {name!r} has type {used.dtype} in the log and {known.dtype} in the {what} table; use one type"
            )
        table = table.with_columns(known)
        once = table.filter(pl.col(name).is_not_null()).unique(name, keep="first", maintain_order=True)
        notes.leave_out(f"{what} table: no id, or an earlier row has it", len(table) - len(once))
        table = once
        every.append(once[name])
        lacking = int(used.is_in(once[name].implode()).not_().sum())
        if lacking == len(used) and len(once):
            raise ValueError(
                f"the {what} table has no {what} of the log: column {name!r} has {once[name][0]!r} there and "
                f"{used[0]!r} in the log; write ids in one form"
            )
        notes.count(f"{what}s of the log are not in the {what} table: their features are zeros", lacking)
    if listed is not None:
        every.append(listed)
        if listed.dtype != used.dtype:
            raise ValueError(f"candidates have type {listed.dtype}, and items {used.dtype}; use one type")
    ids = pl.concat([x.rename("id") for x in every]).unique().sort()
    if ids.dtype == pl.String:
        return table, np.array(["", *ids], np.str_)
    absent = 2**64 - 1 if ids.dtype == pl.UInt64 else -(2**63)
    values = ids.to_numpy()
    return table, np.concatenate([np.array([absent], values.dtype), values])


def save_ids(ids: np.ndarray, path: pathlib.Path) -> None:
    """Write ids for `find_rows` to a file whose name begins with `path`."""
    if ids.dtype.kind == "U":
        pl.DataFrame({"id": ids[1:].tolist()}, {"id": pl.String}).write_ipc(f"{path}.arrow", compression="uncompressed")
    else:
        np.save(f"{path}.npy", ids[1:])


def find_rows(column: pl.Series, path: pathlib.Path) -> np.ndarray:
    """Return the rows [n] int32 of ids, all of which `save_ids` has written; those ids need not be in memory."""
    if column.dtype != pl.String:
        ids = np.load(f"{path}.npy", mmap_mode="r")
        return (np.searchsorted(ids, column.to_numpy()) + 1).astype(np.int32)
    every = pl.scan_ipc(f"{path}.arrow", glob=False).with_row_index("row", 1)
    found = every.join(column.unique().to_frame("id").lazy(), "id", "semi").collect()
    rows = column.to_frame("id").join(found, "id", "left", maintain_order="left")["row"]
    return rows.cast(pl.Int32).to_numpy()


def rows_of_ids(column: pl.Series, ids: np.ndarray) -> np.ndarray:
    """Return rows [n] int32 of ids; all are known."""
    if column.dtype == pl.String:
        kind = pl.Enum(ids[1:].tolist())
        return column.cast(kind).to_physical().to_numpy().astype(np.int32) + 1
    return (np.searchsorted(ids[1:], column.to_numpy()) + 1).astype(np.int32)


class ItemTable(NamedTuple):
    """The items of a log.

    Attributes:
      items: NumPy arrays [V, ...].
      encoders: of their features.
      vocabularies: {"author", "tag": the texts [n] of rows 1, 2, … of their vocabularies}.
    """

    items: types.Items
    encoders: list[features.ColumnEncoder]
    vocabularies: dict[str, np.ndarray]


def build_items(
    table: pl.DataFrame | None, ids: np.ndarray, seconds: np.ndarray, in_train: np.ndarray, schema: Schema, notes: Notes
) -> ItemTable:
    """Return the item table; everything is fitted on items shown in training.

    Args:
      table: as `table_with_ids` returns it.
      ids: [V] of all items.
      seconds: [V] float32 lengths in the log, 0 where it has none.
      in_train: [V] bool.
      schema: with units.
      notes: takes what is assumed.
    """
    size = len(ids)
    values, encoders = np.zeros((size, 0), np.float32), []
    place = {"author": np.zeros(size, np.int32), "tag": np.zeros(size, np.int32)}
    vocabularies = {name: np.zeros(0, np.str_) for name in place}
    if table is not None:
        row = rows_of_ids(table[schema.item], ids)
        if schema.duration and schema.duration in table.columns:
            unit = columns.duration_unit(table[schema.duration], schema, notes)
            columns.check_durations(table[schema.duration], unit)
            found = columns.durations(table[schema.duration], unit).fill_null(0.0).to_numpy()
            seconds = seconds.copy()
            seconds[row] = np.maximum(seconds[row], found.astype(np.float32))
        names = [name for name in table.columns if name not in {schema.item, schema.author, schema.tag}]
        encoders = features.fit_encoders(table, names, in_train[row], notes, "item")
        encoded = features.encode_table(table, encoders)
        values = np.zeros((size, encoded.shape[1]), np.float32)
        values[row] = encoded
        for name, column in (("author", schema.author), ("tag", schema.tag)):
            if column:
                place[name][row], vocabularies[name] = _vocabulary(table[column], in_train[row])
                if isinstance(features.prepared(table[column]).dtype, pl.List):
                    notes.assume(f"the first value of each list in {column} is the {name}")
    made = types.Items(
        author=place["author"],
        tag=place["tag"],
        duration=seconds,
        features=values,
        embedding_id=np.where(in_train, np.cumsum(in_train), 0).astype(np.int32),
        num_embeddings=int(in_train.sum()) + 1,
        num_authors=len(vocabularies["author"]) + 1,
        num_tags=len(vocabularies["tag"]) + 1,
    )
    return ItemTable(made, encoders, vocabularies)


def _vocabulary(column: pl.Series, in_train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number [n] of each value, 0 for one not in training, and the texts of 1, 2, …, in order."""
    column = features.prepared(column)
    if isinstance(column.dtype, pl.List):
        column = column.list.first()
    texts = column.cast(pl.String)
    vocabulary = texts.filter(pl.Series(in_train)).drop_nulls().unique().sort()
    known = pl.DataFrame({"value": vocabulary}).with_row_index("number", 1)
    number = pl.DataFrame({"value": texts}).join(known, "value", "left", maintain_order="left")["number"]
    return number.fill_null(0).to_numpy(), np.array(vocabulary.to_list(), np.str_)


def build_profiles(
    table: pl.DataFrame | None, ids: np.ndarray, in_train: np.ndarray, schema: Schema, notes: Notes
) -> tuple[np.ndarray, list[features.ColumnEncoder]]:
    """Return features [U, Du] of users and their encoders, fitted on the users `in_train` [U] bool."""
    if table is None:
        return np.zeros((len(ids), 0), np.float32), []
    place = rows_of_ids(table[schema.user], ids)
    names = [name for name in table.columns if name != schema.user]
    encoders = features.fit_encoders(table, names, in_train[place], notes, "user")
    encoded = features.encode_table(table, encoders)
    values = np.zeros((len(ids), encoded.shape[1]), np.float32)
    values[place] = encoded
    return values, encoders
