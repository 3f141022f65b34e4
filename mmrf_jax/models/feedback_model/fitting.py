"""Fitting of the feedback model g by regression on logged exposures, and measurements on held-out sessions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax import types
from mmrf_jax.models import heads, kinds, optimization, representation
from mmrf_jax.models.feedback_model import counterfactuals, exposure, network
from mmrf_jax.models.feedback_model.network import FeedbackConfig, FeedbackState
from mmrf_jax.models.optimization import make_optimizer
from mmrf_jax.parallel import programs

_LEVEL_WEIGHT = 0.3  # of the losses of the numeric signals' levels
_PLATT_PRIOR = 10.0  # pseudo-exposures


def update(
    state: FeedbackState,
    batch: types.SessionBatch,
    items: types.Items,
    config: FeedbackConfig,
    lr_scale: chex.Numeric = 1.0,
) -> tuple[FeedbackState, dict[str, chex.Array]]:
    """Run one regression step of both twins on shown videos; jit it with `config` static and `state` donated.

    Args:
      lr_scale: factor on the learning rate.

    Returns:
      The next state and scalar metrics, means over the twins.
    """
    key = jax.random.fold_in(state.key, state.step)
    masks = batch.loss_masks()
    counts = masks.counts()
    continues = jnp.where(batch.terminated[:, :-1], 0.0, 1.0)
    batch = batch.without_last()
    unseen = imputed = candidates = None
    if config.imputed_weight is not None:
        unseen, imputed = _imputed(config, batch, masks.exposure, jax.random.fold_in(key, 1))
    inputs = representation.gather(batch, items, unseen)
    if config.debias is not None:
        candidates = network.encode_videos(config, state, items, batch.candidates, batch.date)

    def loss_fn(params, rows):
        encoded = network.encode(config, params, rows, inputs, key)
        out = network.predict(config, params, *encoded.user, encoded.shown)
        per_signal = losses(config, out, jnp.asarray(batch.feedback), state.scale)  # [2, B, T, K, S + Q]
        if candidates is None:
            more: dict[str, jax.Array] = {}
            per_signal = jnp.einsum("btk,nbtks->s", masks.exposure, per_signal) / counts.exposure
        else:
            weight, more = _exposure_weights(config, params, encoded, candidates, batch, masks.exposure)
            per_signal = jnp.einsum("nbtk,nbtks->s", weight, per_signal)
        if imputed is not None:
            out_unseen = network.predict(config, params, *encoded.user, encoded.unseen)
            none = jnp.zeros((*encoded.unseen.shape[1:-1], len(config.all_signals)))
            each = losses(config, out_unseen, none, state.scale) * _can_be_none(config)
            per_signal += jnp.einsum("btk,nbtks->s", imputed, each) / counts.exposure
        exposed, continued, known = (
            jax.lax.broadcast_to_rank(x, x.ndim + 1) for x in (masks.exposure, continues, masks.next_known)
        )
        continuation = jnp.sum(known * heads.continuation_loss(out, exposed, continued)) / counts.next_known
        levels = [f"level_{name}" for name in config.all_signals.numeric_names]
        weights = jnp.asarray((*config.loss_weights, *(_LEVEL_WEIGHT for _ in levels)), jnp.float32)
        names = (*config.all_signals.names, *levels)
        metrics = {f"loss/{s}": per_signal[i] / network.TWINS for i, s in enumerate(names)}
        metrics["loss/continuation"] = continuation / network.TWINS
        metrics |= {name: x / network.TWINS for name, x in more.items()}
        return jnp.sum(weights * per_signal) + continuation + sum(more.values()), metrics

    learnable = optimization.Learnable(state.params, state.optimizer, state.tables)
    learned, metrics, norm = optimization.step(learnable, inputs.ids, loss_fn, config, make_optimizer(config), lr_scale)
    state = dataclasses.replace(
        state, step=state.step + 1, params=learned.params, optimizer=learned.optimizer, tables=learned.tables
    )
    return state, metrics | {"grad_norm": norm}


def _imputed(
    config: FeedbackConfig, batch: types.SessionBatch, exposed: chex.Array, key: types.Key
) -> tuple[chex.Array, chex.Array]:
    """Sample videos that were not shown [B, T, M], M <= K, for the fit as videos without feedback (Steck, 2010).

    Returns:
      The videos, and their weights: as many as were shown count, except where slates were random.
    """
    assert config.imputed_weight is not None
    number = min(batch.slate.shape[-1], batch.candidates.shape[-1] - batch.slate.shape[-1])
    places = counterfactuals.unseen_slates(key, batch, 1)[..., 0, :number]
    weight = config.imputed_weight * exposed[..., :number]
    if config.exposures == 2:
        weight *= ~types.exposed_at_random(jnp.asarray(batch.context))[..., None]
    return jnp.take_along_axis(jnp.asarray(batch.candidates), places, axis=-1), weight


def _can_be_none(config: FeedbackConfig) -> np.ndarray:
    """Return 1 for the signals, and the levels [S + Q], of which 0 means no feedback, and 0 for values."""
    signals = config.all_signals
    values = signals.of_kind("value")
    return np.array([i not in values for i in (*range(len(signals)), *signals.numeric)], np.float32)


def _exposure_weights(
    config: FeedbackConfig,
    params: Any,
    encoded: representation.Encoded,
    candidates: chex.Array,
    batch: types.SessionBatch,
    exposed: chex.Array,
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Return self-normalised weights [2, B, T, K] of exposures, whose sum is 1 per twin, and the loss of propensities.

    Args:
      candidates: [2, B, T, C, D] encodings.
      exposed: [B, T, K] of `types.LossMasks`.
    """
    each, log_ratio = exposure.log_propensities(network.exposure_scores(config, params, encoded, candidates), batch)
    at_random, chosen = None, exposed
    if config.exposures == 2:
        at_random = types.exposed_at_random(jnp.asarray(batch.context))
        chosen = exposed * ~at_random[..., None]
        at_random = jnp.broadcast_to(at_random, log_ratio.shape[:-1])
    weight = exposure.weights(log_ratio, at_random) * jnp.broadcast_to(exposed, log_ratio.shape)
    total = jnp.maximum(weight.sum(axis=(1, 2, 3), keepdims=True), 1e-6)
    return weight / total, {"loss/exposure": exposure.loss(each, chosen).sum()}


def losses(config: FeedbackConfig, out: heads.Prediction, feedback: chex.Array, scale: chex.Array) -> chex.Array:
    """Compute losses [2, ..., M, S + Q] of predictions of feedback [..., M, S]; the last Q are of the levels."""
    signals = config.all_signals
    wanted = kinds.levels(signals, feedback, scale)
    levels = (jnp.moveaxis(out.extra, -2, -1) - jax.lax.broadcast_to_rank(wanted, wanted.ndim + 1)) ** 2
    if config.loss == "likelihood":
        per_signal = heads.feedback_loss(
            signals, out.feedback, jnp.broadcast_to(feedback, (network.TWINS, *feedback.shape)), scale
        )
    else:
        unit = jnp.where(np.isin(np.arange(len(signals)), signals.numeric), scale, 1.0)
        predicted = jnp.moveaxis(heads.expected_feedback(signals, out.feedback, scale), -2, -1)
        per_signal = ((predicted - feedback) / unit) ** 2
    return jnp.concatenate([per_signal, levels], axis=-1)


@programs.program(calls="some", static_argnames="config")
def _measure(state: FeedbackState, batch: types.SessionBatch, items: types.Items, config: FeedbackConfig):
    unseen = imputed = none = None
    key = jax.random.fold_in(state.key, 2**32 - 1)  # no update has this number
    if config.imputed_weight is not None:
        exposed = (jnp.asarray(batch.slate_mask) & batch.mask[..., None]).astype(jnp.float32)
        unseen, imputed = _imputed(config, batch, exposed, jax.random.fold_in(key, 1))
    encoded = network.encode_batch(config, state, batch, items, unseen)
    out = network.predict(config, state.params, *encoded.user, encoded.shown)
    # Divided by the residual's variance once it is known.
    unit = dataclasses.replace(state, residual=jnp.ones_like(state.residual))

    def log_odds(out):
        p = kinds.take(network.expected(config, out, state.scale), config.all_signals.binary, -1)
        p = jnp.clip(p, 1e-6, 1.0 - 1e-6)
        return jnp.log(p) - jnp.log1p(-p)

    if imputed is not None:
        none = log_odds(network.predict(config, state.params, *encoded.user, encoded.unseen)), imputed
    weight = jnp.ones(batch.slate.shape)
    if config.debias is not None:
        candidates = network.encode_videos(config, state, items, batch.candidates, batch.date)
        scores = network.exposure_scores(config, state.params, encoded, candidates)
        weight = network.mean_of_twins(exposure.weights(exposure.log_propensities(scores, batch)[1]))
    return (
        network.mean_levels(out),
        network.uncertainty(config, unit, representation.gather(batch, items), key),
        log_odds(out),
        weight,
        none,
    )


def measure(
    state: FeedbackState,
    batches: Iterable[types.SessionBatch],
    items: types.Items,
    config: FeedbackConfig,
    calibrate: bool = False,
) -> FeedbackState:
    """Return the state with scales of uncertainty and residuals of the levels, from held-out sessions.

    Args:
      calibrate: whether to also fit a slope and an offset of the log-odds of binary signals to these sessions. Users
        whose own rates were fitted are overestimated on later days.
    """
    predicted, observed, divergence, log_odds, weights, random, imputed = [], [], [], [], [], [], []
    for batch in batches:
        mean, u, raw, weight, none = jax.tree.map(
            lambda x: np.asarray(x)[:, :-1], _measure(state, batch, items, config)
        )
        batch = jax.device_get(batch)
        shown = batch.loss_masks().exposure > 0
        predicted.append(mean[shown])
        observed.append(batch.feedback[:, :-1][shown])
        divergence.append(u[shown].astype(np.float64))
        log_odds.append(raw[shown])
        weights.append(weight[shown])
        at_random = types.exposed_at_random(batch.context[:, :-1]) & (config.exposures == 2)
        random.append(np.broadcast_to(at_random[..., None], shown.shape)[shown])
        if none is not None:
            imputed.append((none[0][none[1] > 0], none[1][none[1] > 0]))
    every, labels, kind, weight = (np.concatenate(x) for x in (log_odds, observed, random, weights))
    weight = np.where(kind, 1.0, weight)
    signals = config.all_signals
    wanted = np.asarray(kinds.levels(signals, labels[~kind], np.asarray(state.scale)))
    scale = np.concatenate(divergence)[~kind].mean(axis=0)
    of_levels = [_residuals(*columns) for columns in zip(wanted.T, np.concatenate(predicted)[~kind].T, strict=True)]
    for i, (residual, _, _) in zip(signals.numeric, of_levels, strict=True):
        scale[i] /= residual**2
    calibration = np.asarray(state.calibration)
    if calibrate:
        rows = [(every[x], labels[x][:, signals.binary], weight[x]) for x in (~kind, kind)[: config.exposures]]
        if imputed:  # as in the fit, where exposures have a mean weight of 1
            rows = [(x, y, w / weight.mean()) for x, y, w in rows]
        for unseen, by in imputed:
            x, y, w = rows[0]
            y = np.concatenate([y, np.zeros_like(unseen)])
            rows[0] = (np.concatenate([x, unseen]), y, np.concatenate([w, by]))
        calibration = np.stack([_platt_of_signals(*x) for x in rows])

    def put(new, old):
        return jax.device_put(np.asarray(new, np.float32), old.sharding)

    empty = (state.residual, state.edges, state.quantiles)
    residuals, edges, quantiles = zip(*of_levels, strict=True) if of_levels else empty

    return dataclasses.replace(
        state,
        uncertainty_scale=put(np.maximum(scale, 1e-12), state.uncertainty_scale),
        calibration=put(calibration, state.calibration),
        residual=put(residuals, state.residual),
        edges=put(edges, state.edges),
        quantiles=put(quantiles, state.quantiles),
    )


def _residuals(actual: np.ndarray, mean: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the standard deviation of the residuals of a level [n], the bins' edges [BINS - 1], and quantiles."""
    error = actual - mean
    residual = max(float(error.std()), 1e-3)
    order = np.argsort(mean, kind="stable")
    parts = np.array_split(error[order], network.BINS)
    grid = np.linspace(0.0, 1.0, network.QUANTILES)
    quantiles = np.stack([np.quantile(part if len(part) else error, grid) for part in parts])
    return residual, np.quantile(mean, np.arange(1, network.BINS) / network.BINS), quantiles


def _platt_of_signals(log_odds: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return `platt` of each signal [2, S - Q], of log-odds and labels [n, S - Q] with weights [n]."""
    return np.stack([platt(x, y, weight) for x, y in zip(log_odds.T, labels.T, strict=True)], axis=1)


def platt(log_odds: np.ndarray, label: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Fit slope and offset [2] of the log-odds [n] of labels [n], by Newton's method on the log-loss (Platt, 1999).

    Weights [n] of the exposures are divided by their mean; None for 1 each.

    A prior worth `_PLATT_PRIOR` exposures shrinks them to slope 1 and offset 0, so that signals with few positives
    hardly change.
    """
    x = np.stack([log_odds, np.ones_like(log_odds)], axis=1).astype(np.float64)
    w = np.ones(len(label)) if weight is None or not len(weight) else weight / weight.mean()
    start = np.array([1.0, 0.0])
    weights = start.copy()
    for _ in range(20):
        p = 0.5 * (1.0 + np.tanh(0.5 * (x @ weights)))
        gradient = x.T @ (w * (p - label)) + _PLATT_PRIOR * (weights - start)
        hessian = (x.T * (w * p * (1.0 - p))) @ x + _PLATT_PRIOR * np.eye(2)
        weights -= np.linalg.solve(hessian, gradient)
    return weights
