"""Off-policy estimates of a run's ranker on a held-out log, from its probabilities, propensities and predictions."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmrf_jax.agents import registry
from mmrf_jax.data import sessions
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.io.progress import counted, phase
from mmrf_jax.ope import behavior_policy, estimators, propensity
from mmrf_jax.training import predictions, sources
from mmrf_jax.training.trained_run import TrainedRun

#: How a log's propensities are known, their logarithms [r, K] given the slots above, and a fitted model's calibration.
Propensities = tuple[str, np.ndarray, dict[str, Any] | None]

_BATCH = 64  # segments scored at a time


def estimate_ranker(run: TrainedRun, log: Sessions, known: Propensities | None = None) -> dict[str, Any]:
    """Estimate all signals for a run's stochastic ranker.

    Args:
      known: the log's propensities, if already computed; otherwise they are computed here.

    Returns:
      {"propensities": "logged", "known" or "fitted", "behaviour": the calibration, if fitted, "units": {"video",
      "slate" if some hold more than one video, "session" if some hold more than one request: as
      `estimators.estimate`}}. Values are per video, and for "session" discounted sums over a session. "dm" and "dr" use
      the first of `plan.predictors`.
    """
    kind, log_propensity, calibration = log_propensities_of(run.source, log) if known is None else known
    phase("off_policy")
    log_probability, expected, direct = _policy(run, log)
    weight = np.where(log.slate >= 0, propensity.log_ratio(log_probability, log_propensity), 0.0)  # [r, K]
    units = estimate_units(log, run.signals.names, weight, run.plan.agents.discount, expected, direct)
    return {"propensities": kind, "units": units} | ({"behaviour": calibration} if calibration else {})


def estimate_units(
    log: Sessions,
    signals: tuple[str, ...],
    weight: np.ndarray,
    discount: float,
    expected: np.ndarray | None = None,
    direct: np.ndarray | None = None,
    **options,
) -> dict[str, Any]:
    """Compute `estimators.estimate` by unit: "video", "slate" and "session".

    Args:
      signals: names [S].
      weight: [r, K] logarithms of the weights, 0 where nothing was shown.
      discount: per request.
      expected: [r, K, S] a model's prediction for the exposed videos.
      direct: [r, K, S] the same in expectation over the policy.
      **options: of `estimators.estimate`.
    """
    session, request, slot = sessions.exposure_index(log)

    def at(x: Any) -> Any:
        return None if x is None else x[request, slot]

    user = np.repeat(log.user_id, np.diff(log.offsets))
    rows = estimators.LoggedDecisions(
        log.user_id[session], weight[request, slot], at(log.feedback), at(expected), at(direct)
    )
    units = {"video": estimators.estimate(rows, signals, **options)}
    shown = log.slate >= 0
    reward = np.where(shown[..., None], log.feedback, 0.0).sum(axis=1, dtype=np.float64)
    if (shown.sum(axis=1) > 1).any():
        rows = estimators.LoggedDecisions(user, weight.sum(axis=1), reward, videos=shown.sum(axis=1))
        units["slate"] = estimators.estimate(rows, signals, **options)
    if log.num_requests > log.num_sessions:
        units["session"] = estimators.per_decision(
            log.user_id, log.offsets, weight.sum(axis=1), reward, discount, signals, **options
        )
    return units


def log_propensities_of(source: sources.Source, log: Sessions) -> Propensities:
    """Return how a log's propensities are known, their logarithms [r, K] given the slots above, and any calibration.

    Raises:
      ValueError: if the log's scores do not reproduce its logged propensities, or only some are known.
    """
    shown = log.slate >= 0
    if log.scores is not None:
        each = propensity.log_prob(log.scores, log.slate)
        error = float(np.abs(each.sum(axis=1) - log.log_propensity).max())
        if not error < 1e-2:
            raise ValueError(
                f"the log's scores give log-propensities of slates up to {error:.3g} from the logged ones; log the "
                "scores divided by the temperature"
            )
        return "logged", each, None
    known = np.isfinite(log.log_propensity)
    if known.all() and (shown.sum(axis=1) == 1).all():
        return "known", np.where(shown, log.log_propensity[:, None], 0.0), None
    if known.any():
        raise ValueError(
            f"{int(known.sum())} of {len(known)} slates have a propensity, but no scores to split it over their "
            "videos; collect the log with keep_scores=True"
        )
    phase("behaviour")
    past = [source.train()] + ([] if source.valid is None else [source.valid()])
    each, calibration = behavior_policy.log_propensities(log, source.items, source.spec.signals, past)
    return "fitted", each, calibration


def _policy(run: TrainedRun, log: Sessions) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return log-probabilities [r, K] of the exposed videos, and two predictions [r, K, S] by the first predictor.

    The predictions are expected feedback: of the exposed videos, and in expectation over the policy.
    """
    plan, state, items, segment = run.plan, run.state, run.items, run.config.train.segment
    index = sessions.segment_index(log, segment)
    done, predictor = counted("off_policy", len(index)), next(iter(plan.predictors), None)
    parts: list[tuple[np.ndarray, ...]] = []
    for rows, batch, live in sessions.padded_batches(log, index, _BATCH, segment):

        def requests(x, live=live):
            return np.asarray(x)[:, :-1][live]

        slate = np.where(requests(batch.slate_mask), requests(batch.slate), -1)
        scores = registry.score_candidates(state.agents, batch, items, plan.agents, plan.method)
        scores = propensity.standardised(requests(scores[..., -1, :]))
        part = [propensity.log_prob(scores, slate)]
        if predictor:
            values = requests(predictions.predict_feedback(state, batch, batch.candidates, items, plan)[predictor])
            part.append(np.take_along_axis(values, np.maximum(slate, 0)[..., None], axis=1))
            part.append(propensity.expectation(scores, slate, values))
        parts.append(tuple(part))
        done(rows.stop)
    joined = [np.concatenate(x) for x in zip(*parts, strict=True)]
    return (joined[0], joined[1], joined[2]) if predictor else (joined[0], None, None)
