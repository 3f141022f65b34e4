"""Encoders shared by agents, critics and the feedback model: videos, and the user state carried over exposures.

`user_encoders` has the ways to carry a user's state. The default, the user memory, is here; `sequence` has the others.
The user memory is linear attention over all exposures of the user: for each decay rate l it holds the decayed mean of
feedback ⊗ item encoding, M_l [F, D]. Reading it at a candidate, M_l e_c, gives the user's feedback on similar videos.
Updating it with a slate costs O(K), whatever the length of the history.
"""

from __future__ import annotations

import functools
import math

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mmrf_jax import types
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.models import embedding_table, kinds, products, sequence
from mmrf_jax.models.encoder_config import EncoderConfig

ITEM_HIDDEN = 64  # units of the hidden layer of items
_PRIOR_WEIGHT = 2.0  # pseudo-exposures of zero in the decayed means, so that short histories shrink to 0
_UNROLLED = 16  # requests of a segment whose memories are computed without a loop


@struct.dataclass
class Memory:
    """Decayed sums over exposures for L decay rates."""

    outer: chex.Array  # [..., L, F, D], of feedback ⊗ item encoding
    weight: chex.Array  # [..., L], of ones

    def mean(self) -> chex.Array:
        """Return the decayed means [..., L, F, D]."""
        return self.outer / (self.weight + _PRIOR_WEIGHT)[..., None, None]

    def inputs(self) -> list[chex.Array]:
        """Return the arrays [..., d] that a user state is computed from."""
        return [self.mean().reshape(*self.outer.shape[:-3], -1), jnp.log1p(self.weight)]


class Encoder(nn.Module):
    """Linen modules of the shared representation; embedding rows are inputs, tables stay outside."""

    config: EncoderConfig

    def setup(self):
        c = self.config
        dense = functools.partial(products.dense, dtype=c.compute_dtype)
        self.item_hidden = dense(ITEM_HIDDEN)
        self.item_out = dense(c.dim - 1 - c.id_dim)
        self.feedback_out = dense(c.feedback_dim - 1)
        self.user_hidden = dense(128)
        self.user_out = dense(c.state_dim)
        self.user_skip = dense(c.state_dim, use_bias=False)
        if c.encoder != "memory":
            self.sequence = sequence.MODULES[c.encoder](c)

    def items(
        self,
        rows: dict[str, chex.Array],
        features: chex.Array,
        train: bool = False,
        feature_dropout: chex.Numeric = 0.0,
    ) -> chex.Array:
        """Encode embedding rows {table: [..., d]} and features [..., Di] as e [..., D].

        The first dimension is 1, the next are the id's row, the last the features. All are one product away from every
        head, so a video's bias is learned from few exposures, and a preference for a feature transfers to videos unlike
        those that were shown.
        """
        rows = {name: self._hide(row, train, self.config.dropout) for name, row in sorted(rows.items())}
        features = self._hide(features, train, feature_dropout)
        x = jnp.concatenate([*rows.values(), features], axis=-1)
        e = self.item_out(nn.gelu(self.item_hidden(x)))
        return jnp.concatenate([jnp.ones_like(e[..., :1]), rows["id"], e, features], axis=-1)

    def feedback(self, feedback: chex.Array, duration: chex.Array) -> chex.Array:
        """Encode feedback [..., S] on videos of these durations (seconds) as [..., F]; the first dimension is 1."""
        signals, numbers = self.config.all_signals, []
        for i in signals.numeric:
            x = feedback[..., i]
            small = jnp.sign(x) * jnp.log1p(jnp.abs(x)) if signals.signals[i].kind == "value" else jnp.log1p(x)
            numbers.append(small / 4.0)
            if signals.signals[i].kind == "duration":  # also as a share of the video
                numbers.append(jnp.minimum(x / jnp.maximum(duration, 1.0), 2.0))
        x = kinds.take(feedback, signals.binary, -1)
        x = jnp.concatenate([x, jnp.stack(numbers, axis=-1)], axis=-1) if numbers else x
        f = jnp.tanh(self.feedback_out(x))
        return jnp.concatenate([jnp.ones_like(f[..., :1]), f], axis=-1)

    def user(
        self,
        carry: Memory | sequence.GruCarry,
        row: chex.Array,
        profile: chex.Array,
        context: chex.Array,
        train: bool = False,
        feature_dropout: chex.Numeric = 0.0,
    ) -> chex.Array:
        """Encode a carry, the user's embedding row [..., d], profile [..., Du] and context [..., Dx] as z [..., Z].

        z ends with profile and context. In training, a fraction `feature_dropout` of the profile's entries is
        hidden, as of the features' in `items`.
        """
        profile = self._hide(profile, train, feature_dropout)
        x = jnp.concatenate([*carry.inputs(), row, profile, context], axis=-1)
        x = self._hide(x, train, self.config.dropout)
        # The linear path learns taste x topic products quickly; the other one learns interactions of several inputs.
        z = self.user_out(nn.gelu(self.user_hidden(x))) + self.user_skip(x)
        return jnp.concatenate([z, profile, context], axis=-1)

    def advance(self, carry: sequence.GruCarry, shown: sequence.EncodedExposure, every: bool) -> sequence.GruCarry:
        """Advance the carry of `gru` or `transformer` over requests [..., n, K]; see `sequence.Gru`."""
        return self.sequence(carry, shown, every)

    def _hide(self, x: chex.Array, train: bool, rate: chex.Numeric) -> chex.Array:
        """Apply dropout with a rate that may be traced, unlike that of `nn.Dropout`."""
        if not train or (isinstance(rate, float) and rate == 0.0):
            return x
        seen = kept(self.make_rng("dropout"), rate, x.shape)
        return jnp.where(seen, x / (1.0 - rate), 0.0)

    def __call__(self, rows, user_row, features, feedback, duration, profile, context):
        """Use every parameter, for initialisation: K videos of one user."""
        e, f = self.items(rows, features), self.feedback(feedback, duration)
        if self.config.encoder == "memory":
            return self.user(memory_write(self.config, None, e, f), user_row, profile, context)
        start = sequence.init_carry(self.config, e.shape[:-2], e.shape[-1])
        shown = sequence.EncodedExposure(e[:, None], f[:, None], None, context[:, None])
        return self.user(self.advance(start, shown, False), user_row, profile, context)


def kept(key: types.Key, rate: chex.Numeric, shape: tuple[int, ...]) -> chex.Array:
    """Draw the mask [*shape] of entries that dropout with a rate in [0, 1) keeps.

    It hashes the entries' numbers in one fused computation; on CPUs `jax.random.bernoulli` takes as long as the layer.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    number = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    bits = embedding_table.mix(embedding_table.mix(number + first) ^ second)
    return bits >= jnp.asarray(rate * 2.0**32, jnp.float32).astype(jnp.uint32)


def sizes(config: EncoderConfig, spec: InputSpec) -> tuple[int, int]:
    """Return Z and D, the sizes of a user state and of an encoding."""
    return config.state_dim + spec.profile + spec.context, config.dim + spec.item_features


def init_encoder(key: types.Key, config: EncoderConfig, spec: InputSpec):
    """Initialise the parameters of the encoder.

    Raises:
      ValueError: for a config of other signals than the spec's.
    """
    if config.all_signals != spec.signals:
        has = f"signals {config.all_signals.described}, the spec {spec.signals.described}"
        raise ValueError(f"the {config.room} config has {has}; set all_signals to the spec's")
    k = spec.slate
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    rows = {name: zeros((1, k, config.table_dims[name])) for name in ("author", "id", "tag")}
    return Encoder(config).init(
        key,
        rows,
        zeros((1, config.user_dim)),
        zeros((1, k, spec.item_features)),
        zeros((1, k, len(config.all_signals))),
        jnp.ones((1, k), jnp.float32),
        zeros((1, spec.profile)),
        zeros((1, spec.context)),
    )


def _decays(config: EncoderConfig, ndim: int) -> chex.Array:
    """Return the decays [..., L] of the memory, broadcast to rank `ndim`."""
    return jax.lax.broadcast_to_rank(jnp.asarray(config.decays, jnp.float32), ndim)


def memory_write(
    config: EncoderConfig,
    memory: Memory | None,
    items: chex.Array,
    feedback: chex.Array,
    mask: chex.Array | None = None,
) -> Memory:
    """Add exposures, oldest first, to the memory; `None` is the empty memory.

    Args:
      items: [..., K, D] encodings.
      feedback: [..., K, F] encodings.
      mask: [..., K] bool; None for all K.
    """
    if mask is None:  # with the batch's full shape, XLA would constant-fold all that follows
        mask = jnp.ones((*(1 for _ in items.shape[:-2]), items.shape[-2]), bool)
    shown = mask.astype(items.dtype)
    # Number of later exposures: the age of each one once all K are added.
    age = jnp.cumsum(shown[..., ::-1], axis=-1)[..., ::-1] - shown
    weight = shown[..., None] * _decays(config, shown.ndim + 1) ** age[..., None]  # [..., K, L]
    outer = jnp.einsum("...kl,...kf,...kd->...lfd", weight, feedback, items)
    total = jnp.broadcast_to(jnp.sum(weight, axis=-2), outer.shape[:-2])
    if memory is None:
        return Memory(outer, total)
    keep = _decays(config, shown.ndim) ** jnp.sum(shown, axis=-1, keepdims=True)  # [..., L]
    return Memory(keep[..., None, None] * memory.outer + outer, keep * memory.weight + total)


def memory_over_requests(
    config: EncoderConfig, start: Memory, items: chex.Array, feedback: chex.Array, mask: chex.Array
) -> Memory:
    """Compute the memory before each of T requests.

    All products are computed outside the scan, which only adds and decays.

    Args:
      start: memory [B, ...] before the first request.
      items: [B, T, K, D].
      feedback: [B, T, K, F].
      mask: [B, T, K].

    Returns:
      Memory with shapes [B, T, L, F, D] and [B, T, L].
    """
    written = memory_write(config, None, items, feedback, mask)
    count = jnp.sum(mask.astype(items.dtype), axis=-1, keepdims=True)
    keep = _decays(config, count.ndim) ** count  # [B, T, L]

    def body(memory, x):
        outer, weight, keep = x
        after = Memory(keep[..., None, None] * memory.outer + outer, keep * memory.weight + weight)
        return after, memory

    time_major = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (written.outer, written.weight, keep))
    # Unrolled, the steps fuse, and no loop copies the memory of every step.
    _, before = jax.lax.scan(body, start, time_major, unroll=_UNROLLED)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), before)
