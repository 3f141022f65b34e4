"""Parts of arrays over signals, by the kind of the signals."""

from __future__ import annotations

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax.signals import Signals


def take(x: chex.Array, where: tuple[int, ...], axis: int) -> chex.Array:
    """Return the entries of an axis at some positions; neighbours are a slice, which costs nothing."""
    first = where[0] if where else 0
    if where == tuple(range(first, first + len(where))):
        return jax.lax.slice_in_dim(x, first, first + len(where), axis=axis % x.ndim)
    return jnp.take(x, np.asarray(where, np.int32), axis=axis)


def join(parts: Mapping[tuple[int, ...], chex.Array], axis: int) -> chex.Array:
    """Concatenate parts of an axis, {positions: entries}, in the order of the positions; empty parts are left out."""
    parts = {where: x for where, x in parts.items() if where}
    order = [i for where in parts for i in where]
    joined = jnp.concatenate(list(parts.values()), axis=axis)
    return joined if order == sorted(order) else take(joined, tuple(np.argsort(order).tolist()), axis)


def levels(signals: Signals, feedback: chex.Array, scale: chex.Array) -> chex.Array:
    """Return the numeric signals [..., Q] of feedback [..., S] on scales where residuals are alike.

    That is log1p of durations and counts, and values divided by their standard deviation, `scale` [S]. NumPy arrays
    give a NumPy array.
    """
    xp = np if isinstance(feedback, np.ndarray) else jnp

    def level(i):
        return feedback[..., i] / scale[i] if signals.signals[i].kind == "value" else xp.log1p(feedback[..., i])

    return xp.stack([level(i) for i in signals.numeric], axis=-1) if signals.numeric else feedback[..., :0]


def of_level(signals: Signals, level: chex.Array, scale: chex.Array, i: int) -> chex.Array:
    """Return numeric signal `i` [...] at a level [...] of `levels`; counts are rounded."""
    if signals.signals[i].kind == "value":
        return level * scale[i]
    amount = jnp.maximum(jnp.expm1(level), 0.0)
    return jnp.round(amount) if signals.signals[i].kind == "count" else amount
