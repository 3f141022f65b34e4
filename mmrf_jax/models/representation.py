"""From a batch of session segments to the inputs of heads: `gather`, look the rows up, `encode` once, pass it on.

inputs = gather(batch, items)
encoded = encode(config, params, embeddings.lookup(tables, inputs.ids), inputs)
"""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp
from flax import struct

from mmrf_jax import types
from mmrf_jax.models import embeddings, encoders, user_encoders
from mmrf_jax.models.encoder_config import EncoderConfig
from mmrf_jax.models.sequence import EncodedExposure


@struct.dataclass
class EncoderInputs:
    """All that the encoders read of a batch, gathered by video and user.

    Seen videos are the H of the history and the (T+1) K of the slates, in order; the M of each request that were not
    shown follow them in `ids` and `features`.
    """

    ids: dict[str, chex.Array]  # {table: [B, H + (T+1) (K + M)]} rows of videos, and [B] rows of users
    features: chex.Array  # [B, H + (T+1) (K + M), Di]
    seen: chex.Array  # [B, H + (T+1) K] video ids
    unseen: chex.Array | None  # [B, T+1, M] video ids
    duration: chex.Array  # [B, H + (T+1) K] of the seen videos, seconds
    unseen_duration: chex.Array | None  # [B, T+1, M]
    feedback: chex.Array  # [B, H + (T+1) K, S] on the seen videos
    history_mask: chex.Array  # [B, H]
    slate_mask: chex.Array  # [B, T+1, K]
    profile: chex.Array  # [B, Du]
    context: chex.Array  # [B, T+1, Dx]
    asked: chex.Array | None = None  # [B, T+1, Dx] contexts that users are read with; None for `context`


@struct.dataclass
class Encoded:
    """A batch, encoded: user states before each of T + 1 requests, and videos."""

    z: chex.Array  # [B, T+1, Z] user states
    carry: Any  # [B, T+1, ...] of the user encoder
    shown: chex.Array  # [B, T+1, K, D] exposed videos
    unseen: chex.Array  # [B, T+1, M, D] videos that were not shown

    @property
    def memory_mean(self) -> chex.Array:
        """The vectors that heads read, of the memory its decayed means, [B, T+1, L, F, D]."""
        return self.carry.mean()

    @property
    def user(self) -> tuple[chex.Array, chex.Array]:
        """What heads read of the user, `z` and `memory_mean`."""
        return self.z, self.memory_mean


def gather(
    batch: types.SessionBatch, items: types.Items, unseen: chex.Array | None = None, at_random: bool = False
) -> EncoderInputs:
    """Gather what the encoders read of a batch.

    Args:
      unseen: [B, T+1, M] ids of videos that were not shown, to encode too; None if there are none.
      at_random: whether each request is read as if its videos were exposed at random (`types.as_if_at_random`).
    """
    num_users, steps, k = batch.slate.shape
    shown = jnp.take_along_axis(batch.candidates, batch.slate, axis=-1)
    seen = jnp.concatenate([batch.history.videos, shown.reshape(num_users, -1)], axis=1)
    videos = seen if unseen is None else jnp.concatenate([seen, unseen.reshape(num_users, -1)], axis=1)
    return EncoderInputs(
        ids={**embeddings.video_ids(items, videos), embeddings.USER_TABLE: batch.user_id},
        features=items.features_of(videos, batch.date),
        seen=seen,
        unseen=unseen,
        duration=items.duration[seen],
        unseen_duration=None if unseen is None else items.duration[unseen],
        feedback=jnp.concatenate([batch.history.feedback, batch.feedback.reshape(num_users, steps * k, -1)], axis=1),
        history_mask=batch.history.mask,
        slate_mask=batch.slate_mask & batch.mask[..., None],
        profile=batch.profile,
        context=batch.context,
        asked=types.as_if_at_random(batch.context) if at_random else None,
    )


def encode(
    config: EncoderConfig,
    params: Any,
    rows: dict[str, chex.Array],
    inputs: EncoderInputs,
    key: types.Key | None = None,
    feature_dropout: chex.Numeric = 0.0,
) -> Encoded:
    """Encode a batch.

    Args:
      params: of the encoder.
      rows: embedding rows of `inputs.ids`.
      key: dropout key; None for no dropout, when scoring.
      feature_dropout: fraction of the entries of profiles and features that is hidden, if there is a key.
    """
    rngs = {} if key is None else {"dropout": key}
    video_rows = {name: rows[name] for name in embeddings.VIDEO_TABLES}
    e = encoders.Encoder(config).apply(
        params, video_rows, inputs.features, key is not None, feature_dropout, method="items", rngs=rngs
    )
    num_seen = inputs.seen.shape[1]
    unseen = e[:, num_seen:].reshape(*inputs.slate_mask.shape[:2], -1, e.shape[-1])
    return encode_users(
        config, params, (e[:, :num_seen], unseen), rows[embeddings.USER_TABLE], inputs, key, feature_dropout
    )


def encode_users(
    config: EncoderConfig,
    params: Any,
    videos: tuple[chex.Array, chex.Array],
    user_rows: chex.Array,
    inputs: EncoderInputs,
    key: types.Key | None = None,
    feature_dropout: chex.Numeric = 0.0,
) -> Encoded:
    """Encode the users of a batch whose videos are encoded: `encode` after its first step.

    Args:
      videos: encodings of the seen [B, H + (T+1) K, D] and of the unseen [B, T+1, M, D] videos.
      user_rows: [B, d].
    """
    users = user_encoders.of(config)
    seen, unseen = videos
    num_users, steps, k = inputs.slate_mask.shape
    h = inputs.history_mask.shape[1]
    every = users.shown(params, seen, inputs.feedback, inputs.duration)

    def slates(x):
        return x[:, h:].reshape(num_users, steps, k, x.shape[-1])

    history = EncodedExposure(seen[:, :h], every.feedback[:, :h], inputs.history_mask)
    shown = EncodedExposure(slates(seen), slates(every.feedback), inputs.slate_mask, inputs.context)
    carry = users.before_each(params, users.start(params, history), shown)

    def at_requests(x):
        return jnp.broadcast_to(x[:, None], (num_users, steps, x.shape[-1]))

    context = inputs.context if inputs.asked is None else inputs.asked
    user = (at_requests(user_rows), at_requests(inputs.profile), context)
    return Encoded(users.read(params, carry, *user, key, feature_dropout), carry, slates(seen), unseen)
