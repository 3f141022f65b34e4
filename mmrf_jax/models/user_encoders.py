"""How a user's state is carried over requests: one interface for `memory`, `gru` and `transformer` (`config.encoder`).

    users = user_encoders.of(config)
    carry = users.init(shape, dim)                   a user without exposures, or
    carry = users.start(params, history)             one with a history
    carry = users.update(params, carry, shown)       after each request
    z = users.read(params, carry, ...)               what heads see, with carry.mean()

A carry is a pytree of arrays of fixed shapes. Rollouts, learned environments, training and the service carry it without
knowing which it is. In training `before_each` gives the carries of a whole segment at once; they are those of `update`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import types
from mmrf_jax.models import encoders, sequence
from mmrf_jax.models.encoder_config import EncoderConfig
from mmrf_jax.models.sequence import EncodedExposure


class Carry(Protocol):
    """The state of users [...] between two requests, a pytree."""

    def mean(self) -> chex.Array:
        """Return vectors in the space of item encodings that heads read, [..., L, F, D]."""
        ...

    def inputs(self) -> list[chex.Array]:
        """Return the arrays [..., d] that a user state is computed from."""
        ...


@dataclasses.dataclass(frozen=True)
class UserEncoder(abc.ABC):
    """The functions of a config's encoder; `params` are those of `encoders.Encoder`."""

    config: EncoderConfig

    @abc.abstractmethod
    def init(self, shape: tuple[int, ...], dim: int) -> Any:
        """Return the carry [*shape, ...] of users without exposures, all zeros.

        Args:
          shape: leading axes.
          dim: D, width of item encodings.
        """

    @abc.abstractmethod
    def start(self, params: Any, history: EncodedExposure) -> Any:
        """Return the carry [...] after a history [..., H] of exposures whose requests are not known."""

    @abc.abstractmethod
    def update_all(self, params: Any, carry: Any, shown: EncodedExposure) -> Any:
        """Return the carry [...] after n requests [..., n, K], oldest first."""

    @abc.abstractmethod
    def before_each(self, params: Any, carry: Any, shown: EncodedExposure) -> Any:
        """Return the carries before each of T requests [..., T, K]: [..., T, ...]."""

    def update(self, params: Any, carry: Any, shown: EncodedExposure) -> Any:
        """Return the carry [...] after one more request [..., K]; one without exposures changes nothing."""

        def one(x):
            return jnp.expand_dims(x, shown.items.ndim - 2)

        return self.update_all(params, carry, jax.tree.map(one, shown))

    def read(
        self,
        params: Any,
        carry: Carry,
        row: chex.Array,
        profile: chex.Array,
        context: chex.Array,
        key: types.Key | None = None,
        feature_dropout: chex.Numeric = 0.0,
    ) -> chex.Array:
        """Return the user states z [..., Z] at requests; heads read `carry.mean()` too.

        Args:
          row: [..., d], the users' embedding rows.
          profile: [..., Du].
          context: [..., Dx].
          key: dropout key; None for no dropout.
          feature_dropout: as in `encoders.Encoder.user`.
        """
        rngs = {} if key is None else {"dropout": key}
        encoder = encoders.Encoder(self.config)
        return encoder.apply(
            params, carry, row, profile, context, key is not None, feature_dropout, method="user", rngs=rngs
        )

    def shown(
        self,
        params: Any,
        items: chex.Array,
        feedback: chex.Array,
        duration: chex.Array,
        mask: chex.Array | None = None,
        context: chex.Array | None = None,
    ) -> EncodedExposure:
        """Encode the feedback [..., K, S] on shown videos with encodings [..., K, D] and durations [..., K] s."""
        f = encoders.Encoder(self.config).apply(params, feedback, duration, method="feedback")
        return EncodedExposure(items, f, mask, context)


class _Memory(UserEncoder):
    """The user memory: sums over all exposures; contexts do not enter it."""

    def init(self, shape, dim):
        levels = len(self.config.decays)
        outer = jnp.zeros((*shape, levels, self.config.feedback_dim, dim), jnp.float32)
        return encoders.Memory(outer, jnp.zeros((*shape, levels), jnp.float32))

    def start(self, params, history):
        return encoders.memory_write(self.config, None, history.items, history.feedback, history.mask)

    def update(self, params, carry, shown):
        return encoders.memory_write(self.config, carry, shown.items, shown.feedback, shown.mask)

    def update_all(self, params, carry, shown):
        *lead, n, k, _ = shown.items.shape
        flat = jax.tree.map(lambda x: x.reshape(*lead, n * k, *x.shape[len(lead) + 2 :]), _without_context(shown))
        return self.update(params, carry, flat)

    def before_each(self, params, carry, shown):
        return encoders.memory_over_requests(self.config, carry, shown.items, shown.feedback, shown.mask)


class _Sequence(UserEncoder):
    """The modules of `models.sequence`, over requests; a history is cut into requests of K videos."""

    def init(self, shape, dim):
        return sequence.init_carry(self.config, shape, dim)

    def start(self, params, history):
        carry = self.init(history.items.shape[:-2], history.items.shape[-1])
        mask = jnp.ones(history.items.shape[:-1], bool) if history.mask is None else history.mask
        exposures = (history.items, history.feedback, mask)
        cut = (in_requests(x, self.config.slate, history.items.ndim - 2) for x in exposures)
        return self.update_all(params, carry, EncodedExposure(*cut))

    def update_all(self, params, carry, shown):
        return encoders.Encoder(self.config).apply(params, carry, shown, False, method="advance")

    def before_each(self, params, carry, shown):
        return encoders.Encoder(self.config).apply(params, carry, shown, True, method="advance")


@functools.cache
def of(config: EncoderConfig) -> UserEncoder:
    """Return the user encoder of a config."""
    return _Memory(config) if config.encoder == "memory" else _Sequence(config)


def in_requests(x: chex.Array, k: int, axis: int) -> chex.Array:
    """Cut exposures, [..., H, ...] at an axis, into requests of K: [..., ceil(H / K), K, ...].

    The newest are the last ones of the last request, as histories end with the newest; the first request is padded.
    """
    h = x.shape[axis]
    n = max(-(-h // k), 1)
    padded = jnp.pad(x, [(n * k - h if i == axis else 0, 0) for i in range(x.ndim)])
    return padded.reshape(*x.shape[:axis], n, k, *x.shape[axis + 1 :])


def _without_context(shown: EncodedExposure) -> EncodedExposure:
    return dataclasses.replace(shown, context=None)
