"""The embedding tables of videos and users: their rows for a batch, and encodings of videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import types
from mmrf_jax.data.schema import Schema
from mmrf_jax.models import embedding_table, encoders
from mmrf_jax.models.encoder_config import EncoderConfig

VIDEO_TABLES = ("author", "id", "tag")
USER_TABLE = "user"
# Losses are means over a batch, so a row's gradient is small: a large accumulator would freeze it.
_INITIAL_ACCUMULATOR = 1e-7
_BLOCK = 65_536  # videos encoded at a time
#: Tables of so many rows are split by rows over the devices; smaller ones are whole on each.
SPLIT_ROWS = embedding_table.MANY_ROWS
SPLITS = 256  # their rows, some of them nobody's, are a multiple of this
# Tags are few and each is seen often: telling them apart from the start spares the slow way out of a product of zeros.
# A user without training rows has zeros: what is known of nobody in particular.
_INIT_SCALE = {"author": 0.1, "id": 0.02, "tag": 0.5, "user": 0.0}


def init(
    key: types.Key, config: EncoderConfig, schema: Schema, items: types.Items, copies: int = 1
) -> dict[str, embedding_table.Table]:
    """Fresh tables; rows are `copies` times as wide as the config says, side by side.

    A table that is split has rows up to a multiple of `SPLITS`.
    """
    sizes = {
        "author": schema.num_authors,
        "id": items.num_embeddings,
        "tag": schema.num_tags,
        "user": max(schema.num_users, 1),
    }
    return {
        name: embedding_table.init(
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
    """Rows of the table of a vocabulary."""
    return rows if rows < SPLIT_ROWS else -(-rows // SPLITS) * SPLITS


def is_split(t: embedding_table.Table, devices: int) -> bool:
    """Whether a table is split by rows over so many devices."""
    return t.num_rows >= SPLIT_ROWS and t.num_rows % devices == 0


def video_ids(items: types.Items, videos: chex.Array) -> dict[str, chex.Array]:
    """Rows of each table of videos for videos [...]."""
    return {"author": items.author[videos], "id": items.embedding_id[videos], "tag": items.tag[videos]}


def lookup(tables: dict[str, embedding_table.Table], ids: dict[str, chex.Array]) -> dict[str, chex.Array]:
    """Rows {table: [..., d]} of ids {table: [...]}."""
    return {name: embedding_table.lookup(tables[name], i) for name, i in ids.items()}


def encode_videos(
    config: EncoderConfig, params: Any, tables, items: types.Items, videos: chex.Array, date: chex.Array | None = None
) -> chex.Array:
    """Encodings [..., D] of videos [...] by encoder parameters, without gradient; `date` as in `Items.features_of`."""
    rows = lookup(tables, video_ids(items, videos))
    e = encoders.Encoder(config).apply(params, rows, items.features_of(videos, date), method="items")
    return jax.lax.stop_gradient(e)


def over_catalogue(encode: Callable[[chex.Array], chex.Array], num_videos: int) -> chex.Array:
    """`encode(arange(num_videos))` in blocks: videos [n] -> [n, ...] for all V of them."""
    blocks = -(-num_videos // _BLOCK)
    size = -(-num_videos // blocks)
    videos = jnp.minimum(jnp.arange(blocks * size, dtype=jnp.int32), num_videos - 1).reshape(blocks, size)
    encoded = jax.lax.map(encode, videos)
    return encoded.reshape(-1, *encoded.shape[2:])[:num_videos]
