"""The embedding tables of videos and users: row lookup for a batch, and encodings of videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import types
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.models import embedding_table, encoders
from mmrf_jax.models.encoder_config import EncoderConfig

VIDEO_TABLES = ("author", "id", "tag")
USER_TABLE = "user"
# Losses are means over a batch, so a row's gradient is small; a large accumulator would freeze the row.
_INITIAL_ACCUMULATOR = 1e-7
_BLOCK = 65_536  # videos encoded at a time
#: Tables with at least this many rows are sharded by rows over the devices; smaller ones are replicated.
SPLIT_ROWS = embedding_table.MANY_ROWS
SPLITS = 256  # sharded tables are padded to a multiple of this many rows
# Tags are few and frequent: rows that differ from the start avoid the slow escape from a product of zeros.
# A user without training rows has zeros, the embedding of an unknown user.
_INIT_SCALE = {"author": 0.1, "id": 0.02, "tag": 0.5, "user": 0.0}


def init_tables(
    key: types.Key, config: EncoderConfig, spec: InputSpec, items: types.Items, copies: int = 1
) -> dict[str, embedding_table.Table]:
    """Initialise the tables; rows are `copies` times as wide as in the config, concatenated.

    A sharded table is padded to a multiple of `SPLITS` rows.
    """
    sizes = {
        "author": spec.num_authors,
        "id": items.num_embeddings,
        "tag": spec.num_tags,
        "user": max(spec.num_users, 1),
    }
    return {
        name: embedding_table.init_table(
            jax.random.fold_in(key, i),
            padded(min(vocabulary, config.max_rows)),
            copies * config.table_dims[name],
            _INIT_SCALE[name],
            _INITIAL_ACCUMULATOR,
            vocabulary,
            config.table_dtype,
        )
        for i, (name, vocabulary) in enumerate(sorted(sizes.items()))
    }


def padded(rows: int) -> int:
    """Return the number of rows, with padding, of a table for this many ids."""
    return rows if rows < SPLIT_ROWS else -(-rows // SPLITS) * SPLITS


def is_split(t: embedding_table.Table, devices: int) -> bool:
    """Return whether a table is sharded by rows over this many devices."""
    return t.num_rows >= SPLIT_ROWS and t.num_rows % devices == 0


def video_ids(items: types.Items, videos: chex.Array) -> dict[str, chex.Array]:
    """Return the rows of videos [...] in each table of videos."""
    return {"author": items.author[videos], "id": items.embedding_id[videos], "tag": items.tag[videos]}


def lookup(tables: dict[str, embedding_table.Table], ids: dict[str, chex.Array]) -> dict[str, chex.Array]:
    """Look up rows {table: [..., d]} of ids {table: [...]}."""
    return {name: embedding_table.lookup(tables[name], i) for name, i in ids.items()}


def split_rows(rows: chex.Array, copies: int) -> chex.Array:
    """Split rows [..., copies d], which `init_tables` concatenated, into [copies, ..., d]."""
    return jnp.moveaxis(rows.reshape(*rows.shape[:-1], copies, -1), -2, 0)


def encode_videos(
    config: EncoderConfig, params: Any, tables, items: types.Items, videos: chex.Array, date: chex.Array | None = None
) -> chex.Array:
    """Encode videos [...] as [..., D], without gradient; `date` as in `Items.features_of`."""
    rows = lookup(tables, video_ids(items, videos))
    e = encoders.Encoder(config).apply(params, rows, items.features_of(videos, date), method="items")
    return jax.lax.stop_gradient(e)


def map_over_items(encode: Callable[[chex.Array], chex.Array], num_videos: int) -> chex.Array:
    """Compute `encode(arange(num_videos))` in blocks; `encode` maps videos [n] to [n, ...]."""
    blocks = -(-num_videos // _BLOCK)
    size = -(-num_videos // blocks)
    videos = jnp.minimum(jnp.arange(blocks * size, dtype=jnp.int32), num_videos - 1).reshape(blocks, size)
    encoded = jax.lax.map(encode, videos)
    return encoded.reshape(-1, *encoded.shape[2:])[:num_videos]
