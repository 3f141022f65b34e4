"""From a batch of session segments to the inputs of heads: user states before every request, and encoded videos."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax.numpy as jnp
from flax import struct

from mmrf_jax import types
from mmrf_jax.models import embeddings, encoders
from mmrf_jax.models.encoder_config import EncoderConfig


@struct.dataclass
class Representation:
    """User states before each of T + 1 requests, and encoded videos."""

    z: chex.Array  # [B, T+1, Z]
    memory: encoders.Memory  # [B, T+1, L, F, D]
    shown: chex.Array  # [B, T+1, K, D] encodings of the exposed videos
    unseen: chex.Array  # [B, T+1, M, D] encodings of M videos that were not shown

    @property
    def memory_mean(self) -> chex.Array:
        """The decayed means of the memory, [B, T+1, L, F, D]."""
        return self.memory.mean()


@struct.dataclass
class LossMasks:
    """Masks of what enters the losses; the last request of a segment never does."""

    exposed: chex.Array  # [B, T, K] float32
    request: chex.Array  # [B, T] float32
    known: chex.Array  # [B, T] float32, requests whose continuation is known: termination, or the next request


def seen_videos(batch: types.SessionBatch) -> chex.Array:
    """Return the video ids [B, H + (T+1) K] of the history and of the slates, in order."""
    shown = jnp.take_along_axis(batch.candidates, batch.slate, axis=-1)
    return jnp.concatenate([batch.history.videos, shown.reshape(shown.shape[0], -1)], axis=1)


def ids(batch: types.SessionBatch, items: types.Items, unseen: chex.Array | None = None) -> dict[str, chex.Array]:
    """Return what a batch looks up: rows [B, H + (T+1) (K + M)] of each table of videos, and rows [B] of the users.

    Args:
      unseen: [B, T+1, M] ids of videos that were not shown; None if there are none.
    """
    return {**embeddings.video_ids(items, _videos(batch, unseen)), embeddings.USER_TABLE: batch.user_id}


def _videos(batch: types.SessionBatch, unseen: chex.Array | None) -> chex.Array:
    seen = seen_videos(batch)
    return seen if unseen is None else jnp.concatenate([seen, unseen.reshape(len(seen), -1)], axis=1)


def loss_masks(batch: types.SessionBatch) -> LossMasks:
    """Compute the loss masks as weights."""
    request = batch.mask[:, :-1]
    exposed = batch.slate_mask[:, :-1] & request[..., None]
    known = request & (batch.terminated[:, :-1] | batch.mask[:, 1:])
    return LossMasks(*(x.astype(jnp.float32) for x in (exposed, request, known)))


def next_context(batch: types.SessionBatch) -> chex.Array:
    """Return the context [B, T, Dx] of each next request: the logged one, or this one a position later."""
    context = jnp.asarray(batch.context)
    later = context[:, :-1].at[..., -1].set(jnp.log1p(jnp.expm1(context[:, :-1, -1]) + 1.0))
    return jnp.where(batch.mask[:, 1:, None], context[:, 1:], later)


def represent(
    config: EncoderConfig,
    encoder_params: Any,
    rows: dict[str, chex.Array],
    batch: types.SessionBatch,
    items: types.Items,
    key: types.Key | None,
    unseen: chex.Array | None = None,
    blind: chex.Numeric = 0.0,
) -> Representation:
    """Encode a batch.

    Args:
      key: dropout key; None for no dropout, when scoring.
      rows: embedding rows of `ids`.
      unseen: as given to `ids`.
      blind: fraction of the entries of profiles and features that is hidden, if there is a key.
    """
    videos, user_rows = _videos(batch, unseen), rows[embeddings.USER_TABLE]
    rows = {name: rows[name] for name in embeddings.VIDEO_TABLES}
    rngs = {} if key is None else {"dropout": key}
    encode = functools.partial(encoders.Encoder(config).apply, encoder_params, method="items", rngs=rngs)
    e = encode(rows, items.features_of(videos, batch.date), key is not None, blind)
    num_seen = seen_videos(batch).shape[1]
    not_shown = e[:, num_seen:].reshape(*batch.slate.shape[:2], -1, e.shape[-1])
    return of_encoded(config, encoder_params, e[:, :num_seen], not_shown, user_rows, batch, items, key, blind)


def of_encoded(
    config: EncoderConfig,
    encoder_params: Any,
    seen: chex.Array,
    not_shown: chex.Array,
    user_rows: chex.Array,
    batch: types.SessionBatch,
    items: types.Items,
    key: types.Key | None = None,
    blind: chex.Numeric = 0.0,
) -> Representation:
    """Compute `represent` from encodings of videos.

    Args:
      seen: [B, H + (T+1) K, D] of `seen_videos`.
      not_shown: [B, T+1, M, D].
      user_rows: [B, d].
    """
    encoder = encoders.Encoder(config)
    num_users, steps, k = batch.slate.shape
    h = batch.history.videos.shape[1]
    feedback = jnp.concatenate([batch.history.feedback, batch.feedback.reshape(num_users, steps * k, -1)], axis=1)
    f = encoder.apply(encoder_params, feedback, items.duration[seen_videos(batch)], method="feedback")

    def slates(x):
        return x[:, h:].reshape(num_users, steps, k, x.shape[-1])

    start = encoders.memory_write(config, None, seen[:, :h], f[:, :h], batch.history.mask)
    mask = batch.slate_mask & batch.mask[..., None]
    memory = encoders.memory_over_requests(config, start, slates(seen), slates(f), mask)

    def at_requests(x):
        return jnp.broadcast_to(x[:, None], (num_users, steps, x.shape[-1]))

    user = (at_requests(user_rows), at_requests(batch.profile), batch.context)
    rngs = {} if key is None else {"dropout": key}
    z = encoder.apply(encoder_params, memory, *user, key is not None, blind, method="user", rngs=rngs)
    return Representation(z, memory, slates(seen), not_shown)
