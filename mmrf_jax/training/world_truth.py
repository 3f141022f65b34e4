"""Evaluation of predicted feedback against the world's truth, on shown and unseen videos.

The sessions of a log are replayed in the world with the log's users, PRNG keys and slates, which reproduces their
hidden states.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax import ops, types
from mmrf_jax.data import sessions
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.io import extras
from mmrf_jax.io.progress import counted, say
from mmrf_jax.metrics import model_quality
from mmrf_jax.models.feedback_model import counterfactuals
from mmrf_jax.signals import Signals
from mmrf_jax.training import predictions, simulator_source, sources, steps, train_state
from mmrf_jax.training.train_state import TrainState
from mmrf_jax.training.trained_run import TrainedRun

_SESSIONS, _REQUESTS, _BATCH = 1_024, 4, 64  # sessions of the log, first requests of each, sessions per batch
_RANKED = 200_000  # (user, video) pairs, at most, whose uncertainty is ranked
CALIBRATED = ("click", "long_view", "like", "watch_time")


def replay_log(source: sources.Source, log: Sessions, num_requests: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the true expected feedback [n, T, C, S] and log1p seconds [n, T, C] of candidates by replaying the log.

    These cover the first `num_requests` requests of each session; past its end they are zeros.

    Raises:
      ValueError: if the replay does not reproduce the log.
    """
    assert source.sim is not None and source.truth is not None
    sim, truth = source.sim, source.truth
    key = simulator_source.log_key(source.config.seed)
    step = jax.jit(lambda params, state, slate: (truth(params, state), sim.step_env(key, state, slate, params)[1]))
    _, _, state = jax.jit(sim.reset_env)(key, sim.default_params, jnp.asarray(log.user_id), jnp.int32(0))
    length = np.diff(log.offsets)
    feedback, log_seconds = [], []
    for t in range(num_requests):
        live = t < length
        rows = np.where(live, log.offsets[:-1] + t, 0)
        if not (np.asarray(state.candidates)[live] == log.candidates[rows][live]).all():
            raise ValueError("the log was not collected in this world with this seed; collect it again")
        (expected, seconds), state = step(sim.default_params, state, jnp.asarray(np.maximum(log.slate[rows], 0)))
        feedback.append(np.where(live[:, None, None], expected, 0.0))
        log_seconds.append(np.where(live[:, None], seconds, 0.0))
    return np.stack(feedback, axis=1), np.stack(log_seconds, axis=1)


def _predict(state: TrainState, batch: types.SessionBatch, items: types.Items, plan: steps.TrainConfig):
    """Predict the feedback of all candidates of the first T requests, and find which were or would be chosen."""
    out = predictions.predict_feedback(state, batch, batch.candidates, items, plan)
    exposed = ops.slate_to_multihot(batch.slate, batch.slate_mask, batch.candidates.shape[-1]) > 0
    if plan.use_feedback_model and plan.feedback.exposures == 2:  # as its counterfactual slates are labelled
        unseen = predictions.predict_feedback(state, batch, batch.candidates, items, plan, at_random=True)
        out |= {name: jnp.where(exposed[..., None], out[name], unseen[name]) for name in ("model", "levels")}
    out["shown"] = exposed
    if plan.use_feedback_model:
        out["uncertainty"] = predictions.predict_uncertainty(state, batch, batch.candidates, items, plan)
    if plan.slates:
        key = train_state.model_of(state).key
        preferred = steps.candidate_sampling_logits(state, batch, items, plan, key)
        slates = np.asarray(counterfactuals.unseen_slates(key, batch, plan.slates, preferred))
        c = batch.candidates.shape[-1]
        out["sampled"] = (slates.reshape(*slates.shape[:2], -1, 1) == np.arange(c)).any(axis=-2)
    return {name: np.asarray(x)[:, :-1] for name, x in out.items()}


def compare_with_truth(run: TrainedRun) -> dict[str, Any]:
    """Compute the metrics that need the world's truth, on the run's held-out log.

    Returns:
      {"selection_bias": {predictor: {signal: errors on impressions and non-impressions and their ratio}}, "unseen":
      {predictor: {binary signal: `model_quality.of_unseen` of the non-impressions}}} and, with a feedback model,
      {"uncertainty": {signal: rank correlations with the error, on videos with training exposures; `watch_time` in
      log1p seconds, the scale on which the uncertainty is defined, and `watch_time_seconds`; and `cold_auc`},
      "sample_auc": of a classifier that separates sampled non-impressions from the whole pool}.
    """
    source, plan, signals = run.source, run.plan, run.signals
    log = source.test()["test"]
    log = sessions.select_sessions(log, np.arange(min(_SESSIONS, log.num_sessions)))
    truth, true_log_seconds = replay_log(source, log, _REQUESTS)
    index = np.stack([np.arange(log.num_sessions), log.offsets[:-1]], axis=1)
    done, parts = counted("truth", len(index)), []
    for rows, batch, live in sessions.padded_batches(log, index, _BATCH, _REQUESTS):
        out = _predict(run.state, batch, run.items, plan)
        out["video"] = batch.candidates[:, :-1]
        out["user"] = np.broadcast_to(batch.user_id[:, None, None], out["video"].shape)
        parts.append({name: x[live] for name, x in out.items()})
        here = live[: rows.stop - rows.start]
        parts[-1] |= {"truth": truth[rows][here], "true_log_seconds": true_log_seconds[rows][here]}
        done(rows.stop)
    flat = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}  # [requests, C, …]
    flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in flat.items()}
    result: dict[str, Any] = {
        "selection_bias": {
            name: {
                signal: model_quality.selection_bias(flat[name][:, i], flat["truth"][:, i], flat["shown"])
                for i, signal in enumerate(signals.names)
            }
            for name in plan.predictors
        }
    }
    result["unseen"] = _of_unseen(flat, plan.predictors, signals)
    if plan.use_feedback_model:
        result["uncertainty"] = _uncertainty(flat, source.train(), source)
    if plan.slates:
        try:
            result["sample_auc"] = _sample_auc(flat, source.items)
        except extras.MissingExtra as missing:
            say(f"no sample_auc: {missing}")
    return result


def _of_unseen(flat: dict[str, np.ndarray], predictors: Iterable[str], signals: Signals) -> dict[str, Any]:
    """Return {predictor: {binary signal: `model_quality.of_unseen`}} of the non-impressions."""
    unseen = {name: x[~flat["shown"]] for name, x in flat.items() if name in ("user", "truth", *predictors)}
    return {
        name: {
            signal: model_quality.of_unseen(unseen["user"], unseen[name][:, i], unseen["truth"][:, i])
            for i, signal in zip(signals.binary, signals.binary_names, strict=True)
            if signal in CALIBRATED
        }
        for name in predictors
    }


def _uncertainty(flat: dict[str, np.ndarray], train: Sessions, source: sources.Source) -> dict[str, Any]:
    _, request, slot = sessions.exposure_index(train)
    counts = np.bincount(train.candidates[request, train.slate[request, slot]], minlength=source.items.num_videos)
    order = np.random.default_rng(0).permutation(len(flat["video"]))
    exposures = counts[flat["video"]][order]
    rows, pairs = order[exposures > 0][:_RANKED], order[:_RANKED]
    result = {}
    for signal in CALIBRATED:
        i = source.spec.signals.index(signal)
        u, mean, truth = (flat[name][rows, i] for name in ("uncertainty", "model", "truth"))
        auc = model_quality.cold_auc(flat["uncertainty"][pairs, i], exposures[: len(pairs)])
        if signal == "watch_time":
            result["watch_time_seconds"] = model_quality.uncertainty_ranks(u, mean, truth) | {"cold_auc": auc}
            mean, truth = flat["levels"][rows, 0], flat["true_log_seconds"][rows]
        result[signal] = model_quality.uncertainty_ranks(u, mean, truth) | {"cold_auc": auc}
    return result


def _sample_auc(flat: dict[str, np.ndarray], items: types.Items) -> float:
    """Return the AUC, on the held-out half, of boosting that separates sampled non-impressions from all candidates.

    It is 0.5 if the two are alike."""
    with extras.needed("baselines"):
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.metrics import roc_auc_score

    video = flat["video"]
    pool = np.random.default_rng(1).random(len(video)) < flat["sampled"].mean()
    rows = np.concatenate([np.flatnonzero(flat["sampled"]), np.flatnonzero(pool)])
    label = np.repeat([1, 0], [int(flat["sampled"].sum()), int(pool.sum())])
    features = np.concatenate(
        [np.asarray(items.features)[video[rows]], np.asarray(items.duration)[video[rows], None], flat["model"][rows]],
        axis=1,
    )
    order = np.random.default_rng(2).permutation(len(rows))
    fit, test = order[: len(rows) // 2], order[len(rows) // 2 :]
    model = HistGradientBoostingClassifier(random_state=0).fit(features[fit], label[fit])
    return float(roc_auc_score(label[test], model.predict_proba(features[test])[:, 1]))
