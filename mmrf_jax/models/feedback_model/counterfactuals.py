"""Counterfactual slates of unshown videos, with feedback simulated by the feedback model g."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import random, types
from mmrf_jax.models import heads, kinds, representation
from mmrf_jax.models.feedback_model import network
from mmrf_jax.models.feedback_model.network import FeedbackConfig, FeedbackState
from mmrf_jax.signals import Signals

_WATCHED, _FOLLOWING = "watch_time", ("click", "long_view")  # the latter increase with play time


def _following(signals: Signals) -> tuple[str, ...]:
    """Return the binary signals that are drawn from watch time's uniform: click and long_view, if all three exist."""
    together = _WATCHED in signals.numeric_names and set(_FOLLOWING) <= set(signals.binary_names)
    return _FOLLOWING if together else ()


def num_uniforms(signals: Signals) -> int:
    """Return the number of uniforms per exposure: one per signal, but none for those that follow from watch time."""
    return len(signals) - len(_following(signals))


def draw(
    signals: Signals,
    expected: chex.Array,
    levels: chex.Array,
    edges: chex.Array,
    quantiles: chex.Array,
    scale: chex.Array,
    uniforms: chex.Array,
) -> chex.Array:
    """Sample feedback [..., S] with the predicted means.

    A numeric signal is its predicted level (`models.kinds`; log1p seconds) plus a residual of similar predictions.
    Click and long_view happen in the longest plays, at their predicted rates. All else is sampled independently.

    Args:
      expected: [..., S].
      levels: [..., Q] predicted means of the numeric signals' levels.
      edges: of a `FeedbackState`.
      quantiles: of a `FeedbackState`.
      scale: [S] of a `FeedbackState`.
      uniforms: [..., num_uniforms(signals)] in (0, 1), those of the numeric signals first.
    """
    out, number, following = {}, len(signals.numeric), _following(signals)
    for q, i in enumerate(signals.numeric):
        level = levels[..., q] + _residual(levels[..., q], edges[q], quantiles[q], uniforms[..., q])
        out[i] = kinds.of_level(signals, level, scale, i)
    for i, name in zip(signals.binary, signals.binary_names, strict=True):
        if name in following:
            happens = uniforms[..., signals.numeric_names.index(_WATCHED)] > 1.0 - expected[..., i]
        else:
            happens = uniforms[..., number] < expected[..., i]
            number += 1
        out[i] = happens.astype(jnp.float32)
    return jnp.stack([out[i] for i in range(len(signals))], axis=-1)


def _residual(mean: chex.Array, edges: chex.Array, quantiles: chex.Array, uniform: chex.Array) -> chex.Array:
    """Return the residual [...] at a quantile [...] among those of similar predictions [...], by interpolation."""
    place = uniform * (quantiles.shape[-1] - 1)
    low = jnp.minimum(place.astype(jnp.int32), quantiles.shape[-1] - 2)
    above = mean[..., None] > jax.lax.broadcast_to_rank(edges, mean.ndim + 1)
    row = jnp.sum(above, axis=-1, dtype=jnp.int32)

    def at(i):
        return quantiles.reshape(-1)[row * quantiles.shape[-1] + i]

    return at(low) + (place - low.astype(jnp.float32)) * (at(low + 1) - at(low))


def unseen_slates(
    key: types.Key, batch: types.SessionBatch, num_slates: int, sampling_logits: chex.Array | None = None
) -> chex.Array:
    """Sample slates [B, T+1, num_slates, K] of candidates that were not shown, without replacement.

    Args:
      sampling_logits: [B, T+1, C] logits; their softmax gives the probabilities of the first draw. None for equal ones.
    """
    c, k = batch.candidates.shape[-1], batch.slate.shape[-1]
    position = jax.lax.broadcast_to_rank(jnp.arange(c, dtype=jnp.int32), batch.slate.ndim + 1)
    shown = jnp.any((batch.slate[..., None] == position) & batch.slate_mask[..., None], axis=-2)
    if sampling_logits is None:
        order = jnp.where(shown, -1.0, random.uniforms(key, shown.shape))
    else:  # Gumbel top-k trick
        order = jnp.where(shown, -jnp.inf, sampling_logits + random.to_gumbel(random.uniforms(key, shown.shape)))
    return jax.lax.top_k(order, num_slates * k)[1].reshape(*shown.shape[:-1], num_slates, k)


def simulate_counterfactual_slates(
    state: FeedbackState,
    batch: types.SessionBatch,
    items: types.Items,
    config: FeedbackConfig,
    key: types.Key,
    num_slates: int,
    measure_uncertainty: bool = True,
    sampling_logits: chex.Array | None = None,
    encodings: chex.Array | None = None,
) -> types.CounterfactualSlates:
    """Simulate feedback on `num_slates` counterfactual slates per request, one step of g each, and predict the pool.

    Args:
      key: typed key of this update.
      measure_uncertainty: if False, uncertainty is 0 and costs nothing.
      sampling_logits: see `unseen_slates`.
      encodings: [2, V, D] precomputed encodings of all videos by `state`; None to compute those needed.
    """
    k_slates, k_masks, k_feedback = jax.random.split(key, 3)
    slates = unseen_slates(k_slates, batch, num_slates, sampling_logits)
    flat = slates.reshape(*slates.shape[:2], -1)
    pool = _of_candidates(state, batch, items, config, encodings)

    def at(x, axes):
        return jnp.take_along_axis(x, jnp.expand_dims(flat, axes), axis=-1)

    out = dataclasses.replace(
        pool,
        feedback=at(pool.feedback, (0, 3)),
        extra=at(pool.extra, (0, 3)),
        continue_item_logit=at(pool.continue_item_logit, 0),
    )
    expected = network.expected(config, out, state.scale)  # [B, T+1, M K, S]
    if measure_uncertainty:
        unseen = jnp.take_along_axis(batch.candidates, flat, axis=-1)
        u = uncertainty(state, batch, unseen, items, config, k_masks) / state.uncertainty_scale
    else:
        u = jnp.zeros_like(expected)
    signals = config.all_signals
    uniforms = random.uniforms(k_feedback, (*flat.shape, num_uniforms(signals)))
    levels = network.mean_levels(out)
    sampled = draw(signals, expected, levels, state.edges, state.quantiles, state.scale, uniforms)

    def apart(x):
        return x.reshape(*slates.shape, *x.shape[3:])

    effect = apart(jnp.moveaxis(out.continue_item_logit, 0, -1)).sum(axis=-2)  # [B, T+1, M, 2]
    continue_prob = jax.nn.sigmoid(jnp.moveaxis(out.continue_logit, 0, -1)[:, :, None] + effect).mean(axis=-1)
    answered = types.CounterfactualSlates(slates, apart(expected), apart(u), apart(sampled), continue_prob, _mean(pool))
    return jax.lax.stop_gradient(answered)


def uncertainty(
    state: FeedbackState,
    batch: types.SessionBatch,
    videos: chex.Array,
    items: types.Items,
    config: FeedbackConfig,
    key: types.Key,
) -> chex.Array:
    """Compute the uncertainty [B, T+1, M, S] of g's predictions of videos [B, T+1, M]; `key` is for dropout masks."""
    u = network.uncertainty(config, state, representation.gather(batch, items, videos), key)
    return u[..., batch.slate.shape[-1] :, :]


def predict(
    state: FeedbackState, batch: types.SessionBatch, items: types.Items, config: FeedbackConfig
) -> types.FeedbackPrediction:
    """Predict feedback on all candidates of a batch with g, as `simulate_counterfactual_slates` does."""
    return jax.lax.stop_gradient(_mean(_of_candidates(state, batch, items, config)))


def _of_candidates(
    state: FeedbackState,
    batch: types.SessionBatch,
    items: types.Items,
    config: FeedbackConfig,
    encodings: chex.Array | None = None,
) -> heads.Prediction:
    """Return calibrated raw predictions for all candidates, with the twins on the first axis.

    Where requests say whether they were exposed at random, these are predictions for random exposures: what the logging
    ranker's choice says of a video holds for the videos that it chose.
    """
    at_random = config.exposures == 2
    if encodings is None:
        encoded = network.encode_batch(config, state, batch, items, batch.candidates, at_random)
    else:
        inputs = representation.gather(batch, items, batch.candidates, at_random)
        encoded = network.encode_known(config, state, encodings, inputs)
    out = network.predict(config, state.params, *encoded.user, encoded.unseen)
    context = types.as_if_at_random(batch.context) if at_random else batch.context
    return network.calibrated(config, out, state.calibration, context)


def _mean(out: heads.Prediction) -> types.FeedbackPrediction:
    """Average the twins' raw predictions."""
    return types.FeedbackPrediction(
        *map(network.mean_of_twins, (out.feedback, out.continue_logit, out.continue_item_logit))
    )
