"""Quality of predicted feedback against observed feedback: ranking within users, and calibration of the values.

A prediction is the *expected* feedback of an exposure: a probability for the binary signals, for the numeric ones a
mean, such as of seconds of watch time. `metrics` evaluates it on a log; `uncertainty_ranks` and `selection_bias` need
the simulator's truth. Everything is NumPy on the host. Letters: n exposures, S signals, U users.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import scipy

from mmrf_jax.data import statistics
from mmrf_jax.io import extras, tables
from mmrf_jax.metrics import ranking
from mmrf_jax.metrics.offline import MIN_USERS
from mmrf_jax.signals import Signals

_SMALLEST = 1e-7  # probabilities are clipped to [this, 1 − this] before the logarithm
_MAX_ROWS = 500_000  # maximum exposures for fitting the linear baselines
_MIN_ROWS = 10  # minimum rows of a decile for its rank correlation
_COLD = 5  # a video with fewer exposures is cold


@dataclasses.dataclass(eq=False)
class _Measured:
    """Metrics of one ranker's prediction of one signal."""

    entry: dict[str, Any]
    ranked: ranking.GroupedMetric
    losses: np.ndarray  # [U] mean log-loss or absolute error of each user, users in ascending order


def metrics(
    signals: Signals,
    user_id: np.ndarray,
    feedback: np.ndarray,
    predicted: Mapping[str, Mapping[str, np.ndarray]],
    duration: np.ndarray | None = None,
    draws: int = 1000,
    each: Callable[..., Iterable[Any]] = map,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compute ranking and calibration of each ranker's predictions, and compare the first, the model, with the others.

    Args:
      signals: of the log.
      user_id: [n] integers.
      feedback: [n, S].
      predicted: {ranker: {signal: expected feedback [n]}}; a ranker may omit signals.
      duration: [n] seconds, of the videos; if given, numeric signals are also evaluated within duration deciles.
      draws: samples of the bootstraps over users.
      each: (function, signals) -> its results, in order; several processes may compute them.

    Returns:
      {signal: {ranker: {...}}}, for the signals with at least one prediction.

      Binary signals: "auc" over all rows, "gauc", "gauc_ci95", "eligible_users", "logloss" in nats, "ece" (mean of
      |mean predicted − actual rate| over deciles of the prediction, weighted by rows), "by_decile".
      Numeric signals: "xauc", "xauc_ci95", "eligible_users", "mae" and "rmse" in their unit, "by_decile" and, given
      `duration`, "by_duration", where a ranker by duration has no advantage.
      "by_decile": [{"predicted", "actual": means, "rows"}], ascending; equal predictions share a bin.
      "model_minus", for the rankers after the first if the first predicts the signal too: {"gauc" and "logloss", or
      "xauc" and "mae": {"diff", "ci95"}}, paired over users; a user's loss is weighted by the user's rows, so that
      "diff" is the difference of the two metrics.

      AUC, GAUC and XAUC are None with fewer than MIN_USERS eligible users, and all intervals with fewer users.

    Raises:
      ValueError: for inconsistent shapes, an unknown signal, labels other than 0 and 1, or numbers that are not finite.
    """
    user_id, feedback = np.asarray(user_id), np.asarray(feedback)
    if feedback.shape != (*user_id.shape, len(signals)):
        raise ValueError(f"feedback has shape {feedback.shape}, expected [n, S] for user_id {user_id.shape}")
    _check_finite("feedback", feedback)
    for ranker, of_signals in predicted.items():
        for signal, values in of_signals.items():
            signals.index(signal)
            _check_finite(f"{signal} predicted by {ranker}", values)
    _, user_row, user_rows = np.unique(user_id, return_inverse=True, return_counts=True)

    def measure(signal: str, values: np.ndarray) -> _Measured:
        values, target = np.asarray(values, np.float64), feedback[:, signals.index(signal)].astype(np.float64)
        if signal in signals.numeric_names:
            ranked = ranking.grouped_xauc(user_id, values, target)
            loss = np.abs(values - target)
            entry = _ranking("xauc", ranked, draws)
            entry |= {"mae": float(loss.mean()), "rmse": float(np.sqrt(np.mean(loss**2)))}
            if duration is not None:
                entry["by_duration"] = _by_duration(user_id, values, target, duration)
        else:
            ranked = ranking.grouped_auc(user_id, values, target[:, None])[0]
            loss = _logloss(values, target)
            entry = _ranking("gauc", ranked, draws) | {"logloss": float(loss.mean())}
            entry["auc"] = _auc(target, values) if entry["gauc"] is not None else None
        entry["by_decile"] = [_means(values[rows], target[rows]) for rows in _deciles(values)]
        if signal in signals.binary_names:
            entry["ece"] = _calibration_error(entry["by_decile"])
        return _Measured(entry, ranked, np.bincount(user_row, weights=loss) / user_rows)

    def model_minus(signal: str, model: _Measured, other: _Measured) -> dict[str, Any]:
        rank_metric, loss = ("gauc", "logloss") if signal in signals.binary_names else ("xauc", "mae")
        result: dict[str, Any] = {rank_metric: {"diff": None, "ci95": None}}
        if other.entry[rank_metric] is not None:
            result[rank_metric] = _difference(
                model.ranked.per_user, other.ranked.per_user, model.ranked.impressions, draws
            )
        result[loss] = _difference(model.losses, other.losses, user_rows, draws)
        return result

    first = next(iter(predicted), None)

    def entries_of(signal: str) -> dict[str, dict[str, Any]]:
        measured = {ranker: measure(signal, s[signal]) for ranker, s in predicted.items() if signal in s}
        for ranker, other in measured.items():
            if first in measured and ranker != first:
                other.entry["model_minus"] = model_minus(signal, measured[first], other)
        return {ranker: m.entry for ranker, m in measured.items()}

    found = zip(signals.names, each(entries_of, signals.names), strict=True)
    return {signal: entries for signal, entries in found if entries}


def per_video_mean(
    signals: Signals, train_video: np.ndarray, train_feedback: np.ndarray, video: np.ndarray, num_videos: int
) -> dict[str, np.ndarray]:
    """Return the smoothed mean of each video's training feedback, {signal: [n] float64}; equal for all users.

    Args:
      signals: of the log.
      train_video: [m] of the training exposures.
      train_feedback: [m, S] of the training exposures.
      video: [n] of the exposures to predict.
      num_videos: V.
    """
    feedback = np.asarray(train_feedback, np.float64)
    means = statistics.shrunken_means(np.asarray(train_video), feedback, num_videos)[np.asarray(video)]
    return {signal: means[:, i] for i, signal in enumerate(signals.names)}


def _auc(label: np.ndarray, score: np.ndarray) -> float:
    """Return the area under the ROC curve of labels [n], 0 or 1 and both present; ties count one half."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # of each block of equal scores
    hits = np.cumsum(label[order])[last]
    misses = 1.0 + last - hits
    if len(last) > 2:  # the corners of the curve
        corner = np.concatenate([[True], (np.diff(hits, 2) != 0) | (np.diff(misses, 2) != 0), [True]])
        hits, misses = hits[corner], misses[corner]
    x, y = (np.concatenate([[0.0], count]) / count[-1] for count in (misses, hits))
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2.0))


def logistic(
    signals: Signals,
    features: np.ndarray,
    feedback: np.ndarray,
    tests: Mapping[str, np.ndarray],
    seed: int = 0,
    each: Callable[..., Iterable[Any]] = map,
) -> dict[str, dict[str, np.ndarray]]:
    """Fit linear baselines on plain features: logistic regression for binary signals, else least squares.

    Args:
      signals: of the log.
      features: [m, F] of the training exposures, of which at most 500,000 are used.
      feedback: [m, S] of the training exposures.
      tests: {log: [n, F]} of the exposures to predict.
      seed: of the sample of training exposures.
      each: (function, signals) -> its results, in order; several processes may compute them.

    Returns:
      {log: {signal: [n] float64}}. A signal with a single class in the fitted rows gets its smoothed training mean.
    """
    with extras.needed("baselines"):
        from sklearn.linear_model import LinearRegression, LogisticRegression
        from sklearn.preprocessing import StandardScaler

    features, feedback = np.asarray(features), np.asarray(feedback)
    rows = np.arange(len(features))
    if len(rows) > _MAX_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, _MAX_ROWS, replace=False))
    scaler = StandardScaler().fit(features[rows].astype(np.float64))
    at_train = scaler.transform(features[rows].astype(np.float64))
    at_tests = {log: scaler.transform(x) for log, x in tests.items()}

    def predict(signal: str) -> dict[str, np.ndarray]:
        i = signals.index(signal)
        if signal in signals.numeric_names:
            # Least squares on seconds estimates the mean. On log1p it would estimate a median-like value below the
            # mean; a log link would estimate the mean but explode on features far from the training ones.
            line = LinearRegression().fit(at_train, feedback[rows, i].astype(np.float64))
            least = 0.0 if i in signals.amounts else -np.inf
            return {log: np.maximum(line.predict(x), least) for log, x in at_tests.items()}
        label = feedback[:, i] > 0.5
        if label[rows].any() and not label[rows].all():
            model = LogisticRegression(max_iter=1000).fit(at_train, label[rows])
            return {log: model.predict_proba(x)[:, 1].astype(np.float64) for log, x in at_tests.items()}
        # Adds one exposure of each class: a single row would refute a probability of 0 or 1.
        mean = (label.sum() + 1.0) / (len(label) + 2.0)
        return {log: np.full(len(x), mean) for log, x in at_tests.items()}

    names = (*signals.binary_names, *signals.numeric_names)
    found = dict(zip(names, each(predict, names), strict=True))
    return {log: {signal: by_log[log] for signal, by_log in found.items()} for log in tests}


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Kolmogorov–Smirnov distance of samples [n] and [m]: the largest gap between their CDFs, in [0, 1].

    Raises:
      ValueError: for an empty sample or numbers that are not finite.
    """
    _check_finite("a", a)
    _check_finite("b", b)
    return float(scipy.stats.ks_2samp(a, b, method="asymp").statistic)  # `method` affects only the p-value


def excess_logloss_by_decile(
    uncertainty: np.ndarray, predicted: np.ndarray, label: np.ndarray
) -> list[dict[str, float]]:
    """Compute log-loss in excess of the predictions' own expectation, within deciles of their uncertainty.

    Args:
      uncertainty: [n].
      predicted: [n] probabilities.
      label: [n] 0/1 labels.

    Returns:
      Ascending [{"uncertainty", "logloss", "expected", "excess", "rows"}], means in nats: "expected" is the entropy of
      the predicted probabilities (the log-loss if they were true), and "excess" is the rest.
    """
    uncertainty, predicted = np.asarray(uncertainty, np.float64), np.asarray(predicted, np.float64)
    loss, entropy = _logloss(predicted, np.asarray(label)), _logloss(predicted, np.clip(predicted, 0.0, 1.0))
    columns = {"uncertainty": uncertainty, "logloss": loss, "expected": entropy, "excess": loss - entropy}

    def means(rows):
        return {name: float(column[rows].mean()) for name, column in columns.items()}

    return [means(rows) | {"rows": len(rows)} for rows in _deciles(uncertainty)]


def uncertainty_ranks(uncertainty: np.ndarray, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """Compute rank correlations of uncertainty with |predicted − truth|; all [n], truth being expected feedback.

    Returns:
      "spearman" of uncertainty and error; "spearman_of_prediction", of the prediction itself and the error, the
      baseline to beat since rare feedback has small errors; "within_deciles", the first within deciles of the
      prediction, weighted by rows, without deciles of fewer than 10 rows. A correlation with a constant is None.
    """
    uncertainty, predicted = np.asarray(uncertainty, np.float64), np.asarray(predicted, np.float64)
    error = np.abs(predicted - np.asarray(truth, np.float64))
    within = [(_spearman(uncertainty[rows], error[rows]), len(rows)) for rows in _deciles(predicted)]
    known = [(rho, count) for rho, count in within if rho is not None and count >= _MIN_ROWS]
    weight = sum(count for _, count in known)
    return {
        "spearman": _spearman(uncertainty, error),
        "spearman_of_prediction": _spearman(predicted, error),
        "within_deciles": sum(rho * count for rho, count in known) / weight if known else None,
    }


def cold_auc(uncertainty: np.ndarray, exposures: np.ndarray) -> float | None:
    """Compute how well uncertainty separates cold videos, with fewer than 5 training exposures, from others; both [n].

    Returns:
      AUC: the probability that a cold video is the more uncertain one, ties counting half. None if all are, or none is.
    """
    cold = np.asarray(exposures) < _COLD
    if cold.all() or not cold.any():
        return None
    return _auc(cold.astype(np.float64), np.asarray(uncertainty, np.float64))


def selection_bias(predicted: np.ndarray, truth: np.ndarray, shown: np.ndarray) -> dict[str, float | None]:
    """Compute the mean |predicted − truth| of videos that were shown and of those that were not; all [n], `shown` bool.

    Returns:
      "impressions", "non_impressions" and "ratio", the second over the first; None for an empty mean or a zero divisor.
    """
    error, shown = np.abs(np.asarray(predicted, np.float64) - np.asarray(truth, np.float64)), np.asarray(shown, bool)
    seen = float(error[shown].mean()) if shown.any() else None
    unseen = float(error[~shown].mean()) if not shown.all() else None
    ratio = unseen / seen if seen and unseen is not None else None
    return {"impressions": seen, "non_impressions": unseen, "ratio": ratio}


def of_unseen(
    group: np.ndarray, predicted: np.ndarray, probability: np.ndarray, seed: int = 0
) -> dict[str, float | None]:
    """Compute the quality of a binary signal's predictions for videos without feedback, whose truth is known.

    Args:
      group: [n] integers, within which videos are ranked.
      predicted: [n] probabilities.
      probability: [n] the true ones.
      seed: of labels that are drawn with the true probabilities, to rank by.

    Returns:
      "ece" and "logloss" as of `metrics`, in expectation over the labels; "gauc" of the drawn labels, None if no group
      has both labels.
    """
    predicted, probability = np.asarray(predicted, np.float64), np.asarray(probability, np.float64)
    label = (np.random.default_rng(seed).random(len(probability)) < probability).astype(np.float64)
    ranked = ranking.grouped_auc(group, predicted, label[:, None])[0]
    return {
        "ece": _calibration_error([_means(predicted[rows], probability[rows]) for rows in _deciles(predicted)]),
        "logloss": float(_logloss(predicted, probability).mean()),
        "gauc": ranked.value if ranked.eligible_users else None,
    }


def _calibration_error(bins: Iterable[Mapping[str, Any]]) -> float:
    """Return the mean of |mean predicted − actual rate| over bins, weighted by rows."""
    bins = list(bins)
    return sum(abs(b["predicted"] - b["actual"]) * b["rows"] for b in bins) / sum(b["rows"] for b in bins)


def format_model_quality(result: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Format `metrics` as a Markdown table, one row per signal and ranker; "model −" columns show 95 % intervals."""
    header = ["signal", "ranker", "users", "GAUC / XAUC", "log-loss / MAE", "ECE / RMSE"]
    header += ["model − ranker, GAUC / XAUC", "model − ranker, log-loss / MAE"]

    def number(x):
        return "–" if x is None else f"{x:.4f}"

    def interval(x):
        return "–" if x is None else f"[{x[0]:+.4f}, {x[1]:+.4f}]"

    rows = []
    for signal, rankers in result.items():
        for ranker, entry in rankers.items():
            rank_metric, loss, last = ("xauc", "mae", "rmse") if "xauc" in entry else ("gauc", "logloss", "ece")
            minus = entry.get("model_minus", {})
            cells = [
                signal,
                ranker,
                str(entry["eligible_users"]),
                "too few" if entry[rank_metric] is None else number(entry[rank_metric]),
                *(number(entry[k]) for k in (loss, last)),
            ]
            cells += [interval(minus.get(key, {}).get("ci95")) for key in (rank_metric, loss)]
            rows.append(cells)
    return tables.markdown(header, rows)


def _check_finite(name: str, values: np.ndarray) -> None:
    if not np.size(values) or not np.isfinite(values).all():
        raise ValueError(f"{name}, of shape {np.shape(values)}, must have numbers and all of them finite")


def _logloss(predicted: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return the cross-entropy [n], in nats, of labels, or of their true probabilities, under the prediction."""
    p = np.clip(predicted, _SMALLEST, 1.0 - _SMALLEST)
    return -(label * np.log(p) + (1.0 - label) * np.log1p(-p))


def _deciles(values: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each decile of `values` [n], ascending; ties share one, so there may be fewer than ten."""
    rows = np.arange(len(values))
    return [
        decile.metric for decile in ranking.by_decile(values, rows, values, rows, lambda groups, scores, part: part)
    ]


def _means(predicted: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    return {"predicted": float(predicted.mean()), "actual": float(target.mean()), "rows": len(target)}


def _ranking(name: str, ranked: ranking.GroupedMetric, draws: int) -> dict[str, Any]:
    """Return a ranking metric with its interval; both are None below MIN_USERS."""
    entry: dict[str, Any] = {name: None, f"{name}_ci95": None, "eligible_users": ranked.eligible_users}
    if ranked.eligible_users >= MIN_USERS:
        interval = ranking.bootstrap_interval(ranked.per_user, ranked.impressions, draws)
        entry |= {name: ranked.value, f"{name}_ci95": [interval.low, interval.high]}
    return entry


def _difference(model: np.ndarray, other: np.ndarray, weights: np.ndarray, draws: int) -> dict[str, Any]:
    """Return the weighted mean of model − other over the same users [U], with an interval if U ≥ MIN_USERS."""
    diff = ranking.paired_bootstrap(model, other, weights, draws)
    return {"diff": diff.estimate, "ci95": [diff.low, diff.high] if len(model) >= MIN_USERS else None}


def _by_duration(user_id, predicted, target, duration) -> list[dict[str, Any]]:
    def measure(users: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
        xauc = ranking.grouped_xauc(users, scores, targets)
        enough = xauc.eligible_users >= MIN_USERS
        return _means(scores, targets) | {"xauc": xauc.value if enough else None, "eligible_users": xauc.eligible_users}

    deciles = ranking.by_decile(duration, user_id, predicted, target, measure)
    return [{"duration": [decile.low, decile.high], **decile.metric} for decile in deciles]


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    constant = len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0
    return None if constant else float(scipy.stats.spearmanr(a, b).statistic)
