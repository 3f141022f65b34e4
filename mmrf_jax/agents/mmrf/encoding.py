"""Encodings of videos and users for the agents: by one encoder for all, or by each agent's own (`agents.critics`).

An agent's own encoder reads histories that carry only the signals that the agent is rewarded by; all others are 0. The
agents' encoders are one encoder, mapped over parameters, embedding rows and these signals. Their encodings have the
axis of agents N after those of users and requests: z [..., N, Z], memory [..., N, L, F, D], videos [..., N, M, D].
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import types
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.models import embedding_table, embeddings, encoders, representation


def init_encoders(key: types.Key, config: AgentConfig, spec: InputSpec) -> Any:
    """Initialise the encoder's parameters; of own encoders with the leading axis N."""
    if not config.own_critics:
        return encoders.init_encoder(key, config, spec)
    return jax.vmap(lambda key: encoders.init_encoder(key, config, spec))(jax.random.split(key, config.num_agents))


def num_encoders(config: AgentConfig) -> int:
    """Return the number of encoders, 1 or N: so many embedding rows are concatenated in each table's rows."""
    return config.num_agents if config.own_critics else 1


def own_rows(config: AgentConfig, rows: chex.Array) -> chex.Array:
    """Split embedding rows [..., N d] into those of each agent [N, ..., d]."""
    return embeddings.split_rows(rows, config.num_agents)


def own_signals(config: AgentConfig) -> chex.Array:
    """Return the mask [N, S] of the signals that each agent sees: those of its reward."""
    return jnp.asarray(config.own_signals, jnp.float32)


def encode(
    config: AgentConfig,
    params: Any,
    rows: dict[str, chex.Array],
    inputs: representation.EncoderInputs,
    key: types.Key | None = None,
) -> representation.Encoded:
    """Encode a batch: `representation.encode`, by each agent for `own` critics."""
    if not config.own_critics:
        return representation.encode(config, params, rows, inputs, key)

    def one(params, rows, signals, key):
        seen = dataclasses.replace(inputs, feedback=inputs.feedback * signals)
        return representation.encode(config, params, rows, seen, key)

    keys = None if key is None else jax.random.split(key, config.num_agents)
    apart = {name: own_rows(config, row) for name, row in rows.items()}
    mapped = jax.vmap(one, in_axes=(0, 0, 0, None if key is None else 0), out_axes=2)
    return mapped(params, apart, own_signals(config), keys)


def encode_batch(
    config: AgentConfig,
    params: Any,
    tables: dict[str, embedding_table.Table],
    batch: types.SessionBatch,
    items: types.Items,
    unseen: chex.Array | None = None,
) -> representation.Encoded:
    """Gather, look up and encode a batch without dropout, when nothing is differentiated."""
    inputs = representation.gather(batch, items, unseen)
    return encode(config, params, embeddings.lookup(tables, inputs.ids), inputs)


def encode_videos(
    config: AgentConfig,
    params: Any,
    tables: dict[str, embedding_table.Table],
    items: types.Items,
    videos: chex.Array,
    date: chex.Array | None = None,
) -> chex.Array:
    """Encode videos [..., M] without gradient, as `embeddings.encode_videos`: [..., M, D], or [..., N, M, D]."""
    if not config.own_critics:
        return embeddings.encode_videos(config, params, tables, items, videos, date)
    rows, features = embeddings.lookup(tables, embeddings.video_ids(items, videos)), items.features_of(videos, date)

    def one(params, rows):
        return encoders.Encoder(config).apply(params, rows, features, method="items")

    apart = {name: own_rows(config, row) for name, row in rows.items()}
    return jax.lax.stop_gradient(jax.vmap(one, out_axes=-3)(params, apart))
