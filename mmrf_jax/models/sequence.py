"""A user's state as a sequence of requests: a GRU, as the paper has, and a causal transformer with a fixed window.

Both read a request as the mean over its shown videos of feedback ⊗ item encoding, what the user memory
(`models.encoders`) sums over all requests, and its context. A request without exposures changes nothing.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mmrf_jax.models.encoder_config import EncoderConfig

_LAYERS, _HEADS = 2, 4  # of the transformer


@struct.dataclass
class EncodedExposure:
    """The encoded exposures of a request."""

    items: chex.Array  # [..., K, D] encodings
    feedback: chex.Array  # [..., K, F] encodings
    mask: chex.Array | None = None  # [..., K] bool; None for all K
    context: chex.Array | None = None  # [..., Dx] of the request; None where it is unknown, as of a history's


@struct.dataclass
class GruCarry:
    """The carry of a GRU: the state of users [...] after some requests; all zeros for new ones."""

    state: chex.Array  # [..., E]
    reads: chex.Array  # [..., 1, F, D] vectors in the space of item encodings, a linear map of the state

    def mean(self) -> chex.Array:
        """Return the vectors that heads read, [..., 1, F, D]."""
        return self.reads

    def inputs(self) -> list[chex.Array]:
        """Return the arrays [..., d] that a user state is computed from."""
        return [self.state]


@struct.dataclass
class TransformerCarry(GruCarry):
    """A transformer's carry: it adds the keys and values of the last W requests, the newest last."""

    cache: chex.Array  # [..., W, X], of all layers
    weight: chex.Array  # [..., W], 1 where there was a request, else 0


def init_carry(config: EncoderConfig, shape: tuple[int, ...], dim: int) -> GruCarry:
    """Return the carry of new users.

    Args:
      shape: leading axes of the carry.
      dim: D, width of item encodings.
    """
    c = config

    def zeros(*size: int) -> chex.Array:
        return jnp.zeros((*shape, *size), jnp.float32)

    state, reads = zeros(c.state_dim), zeros(1, c.feedback_dim, dim)
    if c.encoder == "gru":
        return GruCarry(state, reads)
    return TransformerCarry(state, reads, zeros(c.window, _LAYERS * 2 * _HEADS * _head_width(c)), zeros(c.window))


def _head_width(config: EncoderConfig) -> int:
    return max(config.state_dim // _HEADS, 1)


class _Requests(nn.Module):
    """One vector for each request, and whether it has exposures."""

    width: int

    @nn.compact
    def __call__(self, shown: EncodedExposure) -> tuple[chex.Array, chex.Array]:
        """Map requests [..., n, K] to [..., n, width] and [..., n] bool."""
        mask = jnp.ones(shown.items.shape[:-1], bool) if shown.mask is None else shown.mask
        weight = mask.astype(shown.items.dtype)
        count = weight.sum(axis=-1, keepdims=True)
        outer = jnp.einsum("...k,...kf,...kd->...fd", weight, shown.feedback, shown.items)
        mean = outer.reshape(*count.shape[:-1], outer.shape[-2] * outer.shape[-1]) / jnp.maximum(count, 1.0)
        x = nn.Dense(self.width, name="shown")(jnp.concatenate([mean, jnp.log1p(count)], axis=-1))
        if shown.context is not None:
            x = x + nn.Dense(self.width, use_bias=False, name="context")(shown.context)
        return x, mask.any(axis=-1)


class _Reads(nn.Module):
    """Vectors in the space of item encodings, from a state."""

    num: int

    @nn.compact
    def __call__(self, state: chex.Array, dim: int) -> chex.Array:
        """Map states [..., E] to [..., 1, num, dim]; a new user's is 0."""
        # From 0: a random user x video product is unlearned only where logs have such pairs (`heads.UserVectors`).
        reads = nn.Dense(self.num * dim, use_bias=False, kernel_init=nn.initializers.zeros, name="out")(state)
        return reads.reshape(*state.shape[:-1], 1, self.num, dim)


class Gru(nn.Module):
    """A gated recurrent unit (Cho et al., 2014) over requests."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, carry: GruCarry, shown: EncodedExposure, every: bool) -> GruCarry:
        """Advance a carry [...] over n requests [..., n, K], oldest first.

        Returns:
          The carries before each request, [..., n, ...], if `every`; else the one after all, [...].
        """
        width = self.config.state_dim
        x, there = _Requests(3 * width, name="requests")(shown)
        kernel = self.param("hidden", nn.initializers.lecun_normal(), (width, 3 * width), jnp.float32)
        bias = self.param("hidden_bias", nn.initializers.zeros, (width,), jnp.float32)

        def step(state, request):
            x, there = request
            h = state @ kernel
            reset, keep = jnp.split(nn.sigmoid(x[..., : 2 * width] + h[..., : 2 * width]), 2, axis=-1)
            new = jnp.tanh(x[..., 2 * width :] + reset * (h[..., 2 * width :] + bias))
            after = jnp.where(there[..., None], (1.0 - keep) * new + keep * state, state)
            return after, state

        last, before = jax.lax.scan(step, carry.state, (jnp.moveaxis(x, -2, 0), jnp.moveaxis(there, -1, 0)))
        state = jnp.moveaxis(before, 0, -2) if every else last
        return GruCarry(state, _Reads(self.config.feedback_dim, name="reads")(state, shown.items.shape[-1]))


class Transformer(nn.Module):
    """A causal transformer; each request attends to the last W of its user, itself included.

    The keys and values of each layer are carried, as in decoding with a sliding window. So requests one at a time give
    what all of them give in parallel.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, carry: TransformerCarry, shown: EncodedExposure, every: bool) -> TransformerCarry:
        """Advance a carry; see `Gru`."""
        w, size = self.config.window, 2 * _HEADS * _head_width(self.config)
        x, there = _Requests(self.config.state_dim, name="requests")(shown)
        # Requests with exposures first: then the place of a token says how many requests are between it and another.
        x = _rows(x, jnp.argsort(~there, axis=-1, stable=True))
        n = x.shape[-2]
        age = jnp.arange(n, dtype=jnp.int32)[:, None] + w - jnp.arange(w + n, dtype=jnp.int32)
        known = jnp.concatenate([carry.weight, jnp.ones(x.shape[:-1], x.dtype)], axis=-1)
        seen = (age >= 0) & (age < w) & (known > 0.0)[..., None, :]
        new = []
        for layer in range(_LAYERS):
            old = carry.cache[..., layer * size : (layer + 1) * size]
            x, written = _Layer(self.config, name=f"layer_{layer}")(x, old, seen, age)
            new.append(written)
        states = jnp.concatenate([carry.state[..., None, :], nn.LayerNorm(name="norm")(x)], axis=-2)
        cache = jnp.concatenate([carry.cache, jnp.concatenate(new, axis=-1)], axis=-2)

        count = jnp.cumsum(there, axis=-1, dtype=jnp.int32)
        upto = count - there if every else count[..., -1:]  # [..., m] tokens that a carry includes
        window = upto[..., None] + jnp.arange(w, dtype=jnp.int32)  # [..., m, W]
        flat = window.reshape(*window.shape[:-2], window.shape[-2] * w)
        state = _rows(states, upto)
        reads = _Reads(self.config.feedback_dim, name="reads")(state, shown.items.shape[-1])
        after = TransformerCarry(
            state,
            reads,
            _rows(cache, flat).reshape(*window.shape, cache.shape[-1]),
            jnp.take_along_axis(known, flat, axis=-1).reshape(window.shape),
        )
        return after if every else jax.tree.map(lambda x, like: x.reshape(like.shape), after, carry)


class _Layer(nn.Module):
    """Attention over the cached and the new tokens, then an MLP; both with a residual and a norm before."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x: chex.Array, cache: chex.Array, seen: chex.Array, age: chex.Array
    ) -> tuple[chex.Array, chex.Array]:
        """Return tokens [..., n, E] of the next layer, and what this one adds to the cache, [..., n, 2 * heads * d].

        Args:
          x: [..., n, E].
          cache: [..., W, 2 * heads * d] keys and values of earlier tokens.
          seen: [..., n, W + n] bool, which tokens each new one attends to.
          age: [n, W + n] int32, by how many tokens each is older than each new one.
        """
        width = _head_width(self.config)

        def heads(x):
            return x.reshape(*x.shape[:-1], _HEADS, width)

        queries, written = jnp.split(
            nn.Dense(3 * _HEADS * width, name="attend")(nn.LayerNorm(name="norm_in")(x)), [_HEADS * width], axis=-1
        )
        keys, values = jnp.split(jnp.concatenate([cache, written], axis=-2), 2, axis=-1)
        by_age = self.param("by_age", nn.initializers.zeros, (_HEADS, self.config.window), jnp.float32)
        logits = jnp.einsum("...ihd,...jhd->...hij", heads(queries), heads(keys)) / width**0.5
        logits = logits + by_age[:, jnp.clip(age, 0, self.config.window - 1)]
        weights = nn.softmax(jnp.where(seen[..., None, :, :], logits, -1e9), axis=-1)
        read = jnp.einsum("...hij,...jhd->...ihd", weights, heads(values))
        x = x + nn.Dense(x.shape[-1], name="out")(read.reshape(*x.shape[:-1], _HEADS * width))
        hidden = nn.gelu(nn.Dense(2 * x.shape[-1], name="hidden")(nn.LayerNorm(name="norm_hidden")(x)))
        return x + nn.Dense(x.shape[-1], name="mlp")(hidden), written


def _rows(x: chex.Array, index: chex.Array) -> chex.Array:
    """Take rows [..., m, d] of x [..., n, d] by index [..., m]."""
    return jnp.take_along_axis(x, index[..., None], axis=-2)


MODULES: dict[str, Any] = {"gru": Gru, "transformer": Transformer}
