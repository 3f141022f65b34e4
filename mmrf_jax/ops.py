"""Exposure operators, from scores to slates: hard, sampled (Plackett–Luce) and relaxed top-K."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

_SEARCH_STEPS = 20


def top_k(scores: chex.Array, k: int) -> chex.Array:
    """Return the positions [..., K] of the K highest scores [..., C], best first; ties go to the smaller position."""
    return jax.lax.top_k(scores, k)[1]


def standardised(scores: chex.Array) -> chex.Array:
    """Standardise scores [..., C] to mean 0 and standard deviation 1 per request; equal scores give zeros."""
    centred = scores - scores.mean(axis=-1, keepdims=True)
    return centred / jnp.maximum(centred.std(axis=-1, keepdims=True), 1e-6)


def slate_to_multihot(slate: chex.Array, mask: chex.Array, num_candidates: int) -> chex.Array:
    """Encode a slate [..., K] of positions with `mask` [..., K] as the exposure w [..., C]: 1 where shown, else 0."""
    position = jax.lax.broadcast_to_rank(jnp.arange(num_candidates, dtype=jnp.int32), slate.ndim + 1)
    shown = (slate[..., None] == position) & mask[..., None]
    return jnp.any(shown, axis=-2).astype(jnp.float32)


def plackett_luce_log_prob(scores: chex.Array, slate: chex.Array, mask: chex.Array | None = None) -> chex.Array:
    """Compute the log-probability [..., K] of each slot of a slate, given the slots above it.

    The product of the slot probabilities is the Plackett–Luce probability of the ordered slate. Off-policy estimates
    weight each slot separately.

    Args:
      scores: [..., C], already divided by the temperature.
      slate: [..., K] positions in the candidates, in order.
      mask: [..., K] bool; masked-out slots get 0.
    """
    k = slate.shape[-1]
    shown = jnp.ones(slate.shape, bool) if mask is None else mask
    chosen = jnp.take_along_axis(scores, slate, axis=-1)
    position = jax.lax.broadcast_to_rank(jnp.arange(scores.shape[-1], dtype=jnp.int32), scores.ndim)
    taken = jnp.zeros(scores.shape, bool)
    for i in range(k):  # unrolled, so that it fuses with the sum below
        taken |= (slate[..., i : i + 1] == position) & shown[..., i : i + 1]
    # The normaliser of a slot sums over the candidates outside the slate, the slot and the slots below it. Subtracting
    # from the total instead would lose small weights in float32.
    rest = jax.nn.logsumexp(scores, axis=-1, where=~taken, keepdims=True)
    terms = jnp.concatenate([chosen, rest], axis=-1)[..., None, :]  # [..., 1, K + 1]
    there = jnp.append(shown, jnp.ones_like(shown[..., :1]), axis=-1)
    below = jax.lax.broadcast_to_rank(jnp.triu(jnp.ones((k, k + 1), bool)), there.ndim + 1) & there[..., None, :]
    return jnp.where(shown, chosen - jax.nn.logsumexp(terms, axis=-1, where=below), 0.0)


def relaxed_top_k(scores: chex.Array, k: int, temperature: float, weight: chex.Array | None = None) -> chex.Array:
    """Compute the relaxed exposure w(a) in (0, 1)^C with sum K: sigmoid((a - nu) / temperature).

    It maximises <w, a> + temperature * H(w) over exposures of size K, where H is the sum of binary entropies. Its limit
    at temperature 0 is hard top-K. nu is found by bisection and differentiated implicitly.

    Args:
      scores: [..., C] float.
      weight: [..., C], number of candidates that each sampled candidate represents; w is then their total exposure, and
        nu the threshold over all candidates. None for 1 each.
    """
    many = jnp.ones((), scores.dtype) if weight is None else weight
    nu = _threshold(jax.lax.stop_gradient(scores), k, temperature, weight)
    w = jax.nn.sigmoid((jax.lax.stop_gradient(scores) - nu) / temperature)
    slope = many * w * (1.0 - w)
    # d nu = sum(slope * d a) / sum(slope), from sum(w) = K.
    share = slope / (jnp.sum(slope, axis=-1, keepdims=True) + 1e-12)
    nu = nu + jnp.sum(share * (scores - jax.lax.stop_gradient(scores)), axis=-1, keepdims=True)
    return many * jax.nn.sigmoid((scores - nu) / temperature)


def _threshold(scores: chex.Array, k: int, temperature: float, weight: chex.Array | None) -> chex.Array:
    c = scores.shape[-1] if weight is None else jnp.sum(weight, axis=-1, keepdims=True)
    many = jnp.ones((), scores.dtype) if weight is None else weight
    # At these bounds every w is above / below K / C, so the sums bracket K.
    odds = jnp.log(k / (c - k + 1e-6))
    low = jnp.min(scores, axis=-1, keepdims=True) - temperature * odds - 1e-3
    high = jnp.max(scores, axis=-1, keepdims=True) - temperature * odds + 1e-3

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        too_many = jnp.sum(many * jax.nn.sigmoid((scores - middle) / temperature), axis=-1, keepdims=True) > k
        return jnp.where(too_many, middle, low), jnp.where(too_many, high, middle)

    low, high = jax.lax.fori_loop(0, _SEARCH_STEPS, halve, (low, high))
    return 0.5 * (low + high)


def entropy(w: chex.Array, weight: chex.Array | None = None) -> chex.Array:
    """Sum the binary entropies of an exposure [..., C] over candidates, in nats; `weight` as in `relaxed_top_k`."""
    many = jnp.ones((), w.dtype) if weight is None else weight
    w = jnp.clip(w / many, 1e-6, 1.0 - 1e-6)
    return -jnp.sum(many * (w * jnp.log(w) + (1.0 - w) * jnp.log1p(-w)), axis=-1)
