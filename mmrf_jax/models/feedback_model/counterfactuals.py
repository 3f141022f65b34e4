"""Counterfactual slates of unshown videos, with feedback simulated by the feedback model g."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import random, types
from mmrf_jax.models import heads, representation
from mmrf_jax.models.feedback_model import network
from mmrf_jax.models.feedback_model.network import FeedbackConfig, FeedbackState

#: Uniforms per exposure: one for watch time and the signals that follow from it, one for each other signal.
NUM_UNIFORMS = len(types.SIGNALS) - 2
_WATCHED = ("click", "long_view")  # increase with play time, so drawn from the same uniform


def draw(
    expected: chex.Array, log_seconds: chex.Array, edges: chex.Array, quantiles: chex.Array, uniforms: chex.Array
) -> chex.Array:
    """Sample feedback [..., S] with the predicted means.

    Watch time is the prediction of log1p seconds plus a residual of similar predictions. Click and long_view happen in
    the longest plays, at their predicted rates. The other signals are sampled independently.

    Args:
      expected: [..., S].
      log_seconds: [...] predicted mean.
      edges: of a `FeedbackState`.
      quantiles: of a `FeedbackState`.
      uniforms: [..., NUM_UNIFORMS] in (0, 1).
    """
    watch = uniforms[..., 0]
    place = watch * (quantiles.shape[-1] - 1)
    low = jnp.minimum(place.astype(jnp.int32), quantiles.shape[-1] - 2)
    above = log_seconds[..., None] > jax.lax.broadcast_to_rank(edges, log_seconds.ndim + 1)
    row = jnp.sum(above, axis=-1, dtype=jnp.int32)

    def at(i):
        return quantiles.reshape(-1)[row * quantiles.shape[-1] + i]

    residual = at(low) + (place - low.astype(jnp.float32)) * (at(low + 1) - at(low))
    seconds = jnp.maximum(jnp.expm1(log_seconds + residual), 0.0)
    out, number = [], 1
    for i, name in enumerate(types.BINARY_SIGNALS):
        if name in _WATCHED:
            out.append(watch > 1.0 - expected[..., i])
        else:
            out.append(uniforms[..., number] < expected[..., i])
            number += 1
    return jnp.stack([*(x.astype(jnp.float32) for x in out), seconds], axis=-1)


def unseen_slates(
    key: types.Key, batch: types.SessionBatch, num_slates: int, preference: chex.Array | None = None
) -> chex.Array:
    """Sample slates [B, T+1, num_slates, K] of candidates that were not shown, without replacement.

    Args:
      preference: [B, T+1, C] logits; their softmax gives the probabilities of the first draw. None for equal ones.
    """
    c, k = batch.candidates.shape[-1], batch.slate.shape[-1]
    position = jax.lax.broadcast_to_rank(jnp.arange(c, dtype=jnp.int32), batch.slate.ndim + 1)
    shown = jnp.any((batch.slate[..., None] == position) & batch.slate_mask[..., None], axis=-2)
    if preference is None:
        order = jnp.where(shown, -1.0, random.uniforms(key, shown.shape))
    else:  # Gumbel top-k trick
        order = jnp.where(shown, -jnp.inf, preference + random.to_gumbel(random.uniforms(key, shown.shape)))
    return jax.lax.top_k(order, num_slates * k)[1].reshape(*shown.shape[:-1], num_slates, k)


def answer(
    state: FeedbackState,
    batch: types.SessionBatch,
    items: types.Items,
    config: FeedbackConfig,
    key: types.Key,
    num_slates: int,
    measure_uncertainty: bool = True,
    preference: chex.Array | None = None,
    encodings: chex.Array | None = None,
) -> types.CounterfactualSlates:
    """Simulate feedback on `num_slates` counterfactual slates per request, one step of g each, and predict the pool.

    Args:
      key: typed key of this update.
      measure_uncertainty: if False, uncertainty is 0 and costs nothing.
      preference: see `unseen_slates`.
      encodings: [2, V, D] precomputed encodings of all videos by `state`; None to compute those needed.
    """
    k_slates, k_masks, k_feedback = jax.random.split(key, 3)
    slates = unseen_slates(k_slates, batch, num_slates, preference)
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
    expected = network.expected(out, state.scale)  # [B, T+1, M K, S]
    if measure_uncertainty:
        unseen = jnp.take_along_axis(batch.candidates, flat, axis=-1)
        u = uncertainty(state, batch, unseen, items, config, k_masks) / state.uncertainty_scale
    else:
        u = jnp.zeros_like(expected)
    uniforms = random.uniforms(k_feedback, (*flat.shape, NUM_UNIFORMS))
    log_seconds = network.mean_of_twins(out.extra[..., 0, :])
    sampled = draw(expected, log_seconds, state.edges, state.quantiles, uniforms)

    def apart(x):
        return x.reshape(*slates.shape, *x.shape[3:])

    effect = apart(jnp.moveaxis(out.continue_item_logit, 0, -1)).sum(axis=-2)  # [B, T+1, M, 2]
    stay = jax.nn.sigmoid(jnp.moveaxis(out.continue_logit, 0, -1)[:, :, None] + effect).mean(axis=-1)
    answered = types.CounterfactualSlates(slates, apart(expected), apart(u), apart(sampled), stay, _mean(pool))
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
    """Predict feedback on all candidates of a batch with g, as in `answer`."""
    return jax.lax.stop_gradient(_mean(_of_candidates(state, batch, items, config)))


def _of_candidates(
    state: FeedbackState,
    batch: types.SessionBatch,
    items: types.Items,
    config: FeedbackConfig,
    encodings: chex.Array | None = None,
) -> heads.Prediction:
    """Return calibrated raw predictions for all candidates, with the twins on the first axis."""
    if encodings is None:
        encoded = network.encode_batch(config, state, batch, items, batch.candidates)
    else:
        inputs = representation.gather(batch, items, batch.candidates)
        encoded = network.encode_known(config, state, encodings, inputs)
    out = network.predict(state.params, *encoded.user, encoded.unseen)
    return network.calibrated(out, state.calibration, batch.context)


def _mean(out: heads.Prediction) -> types.FeedbackPrediction:
    """Average the twins' raw predictions."""
    return types.FeedbackPrediction(
        *map(network.mean_of_twins, (out.feedback, out.continue_logit, out.continue_item_logit))
    )
