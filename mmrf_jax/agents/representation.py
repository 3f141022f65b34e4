"""From a batch of session segments to what heads need: user states before every request, and encoded videos."""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp
from flax import struct

from mmrf_jax import types
from mmrf_jax.agents import encoder as enc
from mmrf_jax.agents import state as st
from mmrf_jax.agents.config import AgentConfig


@struct.dataclass
class Representation:
    """Users before each of T + 1 requests."""

    z: chex.Array  # [B, T+1, state_dim]
    memory_mean: chex.Array  # [B, T+1, L, F, D]
    shown: chex.Array  # [B, T+1, K, D] encodings of the exposed videos


@struct.dataclass
class Learned:
    """Which parts of a batch are learned from; the last request of a segment never is."""

    exposed: chex.Array  # [B, T, K] float32
    request: chex.Array  # [B, T] float32
    known: chex.Array  # [B, T] float32, requests of which it is known whether and how the session went on


def seen_videos(batch: types.SessionBatch) -> chex.Array:
    """Ids [B, H + (T+1) K] of the history and of the slates, in order."""
    shown = jnp.take_along_axis(batch.candidates, batch.slate, axis=-1)
    return jnp.concatenate([batch.history.videos, shown.reshape(shown.shape[0], -1)], axis=1)


def ids(batch: types.SessionBatch, items: types.Items) -> dict[str, chex.Array]:
    """What a batch looks up: rows [B, H + (T+1) K] of each table of videos, and rows [B] of the users."""
    return {**st.video_ids(items, seen_videos(batch)), st.USER_TABLE: batch.user_id}


def learned(batch: types.SessionBatch) -> Learned:
    """Masks as weights."""
    request = batch.mask[:, :-1]
    exposed = batch.slate_mask[:, :-1] & request[..., None]
    known = request & (batch.terminated[:, :-1] | batch.mask[:, 1:])
    return Learned(*(x.astype(jnp.float32) for x in (exposed, request, known)))


def represent(
    config: AgentConfig,
    encoder_params: Any,
    rows: dict[str, chex.Array],
    batch: types.SessionBatch,
    items: types.Items,
    key: types.Key | None,
) -> Representation:
    """Encodes a batch.

    Args:
      key: of dropout; None, when scoring, for none.
      rows: embedding rows of `ids`.
    """
    encoder = enc.Encoder(config)
    seen = seen_videos(batch)
    h = batch.history.videos.shape[1]
    num_users, steps, k = batch.slate.shape
    train = key is not None
    rngs = {} if key is None else {"dropout": key}
    user_rows = rows[st.USER_TABLE]
    rows = {name: rows[name] for name in st.VIDEO_TABLES}
    e = encoder.apply(encoder_params, rows, items.features[seen], train, method="items", rngs=rngs)
    feedback = jnp.concatenate([batch.history.feedback, batch.feedback.reshape(num_users, steps * k, -1)], axis=1)
    f = encoder.apply(encoder_params, feedback, items.duration[seen], method="feedback")
    slates = lambda x: x[:, h:].reshape(num_users, steps, k, x.shape[-1])
    start = enc.memory_write(config, None, e[:, :h], f[:, :h], batch.history.mask)
    mask = batch.slate_mask & batch.mask[..., None]
    memory = enc.memory_over_requests(config, start, slates(e), slates(f), mask)
    at_requests = lambda x: jnp.broadcast_to(x[:, None], (num_users, steps, x.shape[-1]))
    user = (at_requests(user_rows), at_requests(batch.profile), batch.context)
    z = encoder.apply(encoder_params, memory, *user, train, method="user", rngs=rngs)
    return Representation(z, memory.mean(), slates(e))
