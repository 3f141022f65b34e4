"""The tables of items and users: ids, vocabularies and features, all fitted on the training part."""

from __future__ import annotations

import numpy as np
import polars as pl

from mmrf_jax import types
from mmrf_jax.data.readers.frame import columns, features, requests, tables
from mmrf_jax.data.readers.frame.columns import Notes
from mmrf_jax.schema import Schema


def read_table(
    table: pl.DataFrame | None, name: str, used: pl.Series, what: str, notes: Notes, lists: pl.Series | None = None
) -> tuple[pl.DataFrame | None, np.ndarray]:
    """Return a table of items or users with its ids, once each, and all ids: row 0 is an unknown one."""
    listed: list[pl.Series] = []
    if table is not None:
        tables.check_names(table.columns, {what: name}, f"{what} table")
        known = columns.ids(table[name])
        if known.dtype != used.dtype:
            raise ValueError(
                f"column {name!r} has type {used.dtype} in the log and {known.dtype} in the {what} table; use one type"
            )
        table = table.with_columns(known)
        once = table.filter(pl.col(name).is_not_null()).unique(name, keep="first", maintain_order=True)
        if len(once) < len(table):
            notes.left_out[f"{what} table: no id, or an earlier row has it"] = len(table) - len(once)
        table = once
        listed.append(once[name])
        lacking = used.unique().is_in(once[name].implode()).not_().sum()
        if lacking:
            notes.assumed.append(
                f"{lacking:,} {what}s of the log are not in the {what} table: their features are zeros"
            )
    if lists is not None:
        listed.append(lists.explode(empty_as_null=False, keep_nulls=False).drop_nulls())
        if listed[-1].dtype != used.dtype:
            raise ValueError(f"candidates have type {listed[-1].dtype}, and items {used.dtype}; use one type")
    every = pl.concat([used.rename("id"), *(x.rename("id") for x in listed)]).unique().sort()
    if every.dtype == pl.String:
        return table, np.array(["", *every], np.str_)
    absent = 2**64 - 1 if every.dtype == pl.UInt64 else -(2**63)
    values = every.to_numpy()
    return table, np.concatenate([np.array([absent], values.dtype), values])


def rows_of(column: pl.Series, ids: np.ndarray) -> np.ndarray:
    """Return rows [n] int32 of ids; all are known."""
    if column.dtype == pl.String:
        kind = pl.Enum(ids[1:].tolist())
        return column.cast(kind).to_physical().to_numpy().astype(np.int32) + 1
    return (np.searchsorted(ids[1:], column.to_numpy()) + 1).astype(np.int32)


def build_items(
    table: pl.DataFrame | None, ids: np.ndarray, rows: requests.Rows, schema: Schema, notes: Notes
) -> tuple[types.Items, list[features.Encoder]]:
    """Return the item table and the encoders of its features; everything is fitted on items shown in training."""
    size, place = len(ids), np.zeros(0, np.int32)
    in_train = np.zeros(size, bool)
    in_train[rows.item[rows.split == 0]] = True
    values, encoders = np.zeros((size, 0), np.float32), []
    seconds = np.zeros(size, np.float32)
    author = tag = np.zeros(size, np.int32)
    num_authors = num_tags = 1
    if table is not None:
        place = rows_of(table[schema.item], ids)
        if schema.duration and schema.duration in table.columns:
            found = columns.durations(table[schema.duration], schema, notes)
            seconds[place] = found.fill_null(0.0).to_numpy()
        taken = {schema.item, schema.author, schema.tag}
        names = [name for name in table.columns if name not in taken]
        encoders = features.fit(table, names, in_train[place], notes, "item")
        encoded = features.encode(table, encoders)
        values = np.zeros((size, encoded.shape[1]), np.float32)
        values[place] = encoded
        author, num_authors = _vocabulary(table, schema.author, place, in_train)
        tag, num_tags = _vocabulary(table, schema.tag, place, in_train)
    if "duration" in rows.frame.columns:
        length = rows.frame["duration"].fill_null(0.0).to_numpy()
        np.maximum.at(seconds, rows.item, length.astype(np.float32))
    made = types.Items(
        author=author,
        tag=tag,
        duration=seconds,
        features=values,
        embedding_id=np.where(in_train, np.cumsum(in_train), 0).astype(np.int32),
        num_embeddings=int(in_train.sum()) + 1,
        num_authors=num_authors,
        num_tags=num_tags,
    )
    return made, encoders


def _vocabulary(
    table: pl.DataFrame, name: str | None, place: np.ndarray, in_train: np.ndarray
) -> tuple[np.ndarray, int]:
    """Return the number [V] of each item's value in a column, 0 for one not in training, and how many there are."""
    out = np.zeros(len(in_train), np.int32)
    if name is None:
        return out, 1
    column = features.prepared(table[name])
    if isinstance(column.dtype, pl.List):
        column = column.list.first()
    texts = column.cast(pl.String)
    vocabulary = texts.filter(pl.Series(in_train[place])).drop_nulls().unique().sort()
    known = pl.DataFrame({"value": vocabulary}).with_row_index("number", 1)
    number = pl.DataFrame({"value": texts}).join(known, "value", "left", maintain_order="left")["number"]
    out[place] = number.fill_null(0).to_numpy()
    return out, len(vocabulary) + 1


def build_profiles(
    table: pl.DataFrame | None, ids: np.ndarray, trained: np.ndarray, schema: Schema, notes: Notes
) -> tuple[np.ndarray, list[features.Encoder]]:
    """Return features [U, Du] of users and their encoders, fitted on the users of training."""
    if table is None:
        return np.zeros((len(ids), 0), np.float32), []
    place = rows_of(table[schema.user], ids)
    names = [name for name in table.columns if name != schema.user]
    encoders = features.fit(table, names, np.isin(place, trained), notes, "user")
    encoded = features.encode(table, encoders)
    values = np.zeros((len(ids), encoded.shape[1]), np.float32)
    values[place] = encoded
    return values, encoders
