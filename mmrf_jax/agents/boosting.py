"""Gradient boosting on plain features: a ranking engineer's first choice, which agents must beat offline.

LightGBM (Ke et al., 2017) on running means of feedback up to the day before, duration, context, and user columns; one
model per signal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mmrf_jax import types
from mmrf_jax.data import sessions, statistics
from mmrf_jax.data.records import num_exposures
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.io import extras
from mmrf_jax.signals import Signals

FREQUENT = ("click", "long_view", "like", "profile_enter", "watch_time")  # of short videos; of other logs all signals
_ROUNDS = 600
_STEP = 25  # rounds between two evaluations on the validation day
_MAX_ROWS = 1_000_000  # exposures fitted on
_USER_PRIOR = 5.0  # pseudo-exposures of the overall mean in a user's means
PARAMETERS: dict[str, Any] = {
    "learning_rate": 0.03,
    "num_leaves": 31,
    "min_data_in_leaf": 100,
    "lambda_l2": 10.0,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "verbose": -1,
    "deterministic": True,
    "force_row_wise": True,
}


def features(
    log: Sessions,
    items: types.Items,
    signals: Signals,
    past: list[Sessions],
    rows: np.ndarray | slice = slice(None),
) -> np.ndarray:
    """Compute one row per exposure of a log (`sessions.exposure_index`), or per one of `rows`, [n, F] float32.

    Running means of `statistics.averaged`, and counts, of the video, its author, its tag and the user over the
    exposures of `past` logs on *earlier days*; the video's duration and features; the request's context; the user's
    profile.
    """
    known, mine = statistics.exposures(past, signals), statistics.exposures([log], signals)
    date, user, video = (x[rows] for x in (mine.date, mine.user, mine.video))
    every = np.arange(items.num_videos)
    columns = [
        statistics.running_means(known, key[known.video], date, key[video], int(key.max()) + 1)
        for key in (every, np.asarray(items.author), np.asarray(items.tag))
    ]
    users, place = np.unique(np.concatenate([known.user, user]), return_inverse=True)
    before, now = place[: len(known.user)], place[len(known.user) :]
    columns.append(statistics.running_means(known, before, date, now, len(users), _USER_PRIOR))
    session, request = (x[rows] for x in sessions.exposure_index(log)[:2])
    columns += [np.asarray(items.duration)[video][:, None], np.asarray(items.features)[video]]
    columns += [log.context[request], log.profile[session]]
    return np.concatenate([column.astype(np.float32) for column in columns], axis=1)


class Table(NamedTuple):
    """Exposures as inputs of simple predictors."""

    user: np.ndarray  # [n] int32
    video: np.ndarray  # [n] int32
    features: np.ndarray  # [n, F] float32
    feedback: np.ndarray  # [n, S] float32


def table(log: Sessions, items: types.Items, signals: Signals, past: list[Sessions], seed: int | None = None) -> Table:
    """Return the exposures of a log, with a seed a sample if there are over a million; `past` as in `features`."""
    rows = np.arange(num_exposures(log))
    if seed is not None and len(rows) > _MAX_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, _MAX_ROWS, replace=False))
    session, request, slot = (x[rows] for x in sessions.exposure_index(log))
    video = log.candidates[request, log.slate[request, slot]]
    return Table(log.user_id[session], video, features(log, items, signals, past, rows), log.feedback[request, slot])


def labels(rows: Table, signals: Signals) -> dict[str, np.ndarray]:
    """Return the labels of each model, {signal: [n]}: 0 or 1, log1p of durations and counts, and values."""
    feedback = rows.feedback.astype(np.float64)
    return {name: statistics.label_of(signals, name, feedback) for name in signals.choose(FREQUENT)}


def scores(
    signals: Signals,
    train: Table,
    valid: Table | None,
    tests: Mapping[str, np.ndarray],
    measure: Callable[[np.ndarray, np.ndarray, np.ndarray], float],
    seed: int = 0,
    rounds: int = _ROUNDS,
    each: Callable[..., Iterable[Any]] = map,
) -> dict[str, dict[str, np.ndarray]]:
    """Score the exposures of test logs, {log: {signal: [n]}}: log-odds, or the expected label.

    A signal with a single label value in the training rows has no scores.

    Args:
      signals: of the logs.
      train: exposures to fit on.
      valid: exposures to choose the number of rounds on; None to use all rounds.
      tests: {log: features [n, F]} to score.
      measure: (users, scores, labels) [n] -> the selection metric; NaN if it is undefined.
      rounds: maximum number of trees of a model.
      each: (function, signals) -> its results, in order; several processes may compute them.
    """
    with extras.needed("baselines"):
        import lightgbm

    at_train, at_valid = labels(train, signals), None if valid is None else labels(valid, signals)
    names = [name for name, label in at_train.items() if len(np.unique(label)) > 1]

    def fitted(name: str) -> dict[str, np.ndarray]:
        binary = name in signals.binary_names
        objective = "binary" if binary else "regression"
        data = lightgbm.Dataset(train.features, at_train[name])
        model = lightgbm.train(PARAMETERS | {"objective": objective, "seed": seed}, data, rounds)
        trees = rounds
        if valid is not None and at_valid is not None:
            trees = _best(model, at_valid[name], binary, valid, measure, rounds)
        return {log: np.asarray(model.predict(x, num_iteration=trees, raw_score=True)) for log, x in tests.items()}

    found = dict(zip(names, each(fitted, names), strict=True))
    return {log: {name: by_log[log] for name, by_log in found.items()} for log in tests}


def _best(model, label: np.ndarray, binary: bool, valid: Table, measure, rounds: int) -> int:
    """Return the number of trees with the best validation metric of a label; all of them if it is undefined."""
    if not binary:  # above the median: all pairs of rows would take longer and choose the same
        label = label > np.median(label)
    score, measured = np.zeros(len(label)), []
    for start in range(0, rounds, _STEP):
        score = score + model.predict(valid.features, start_iteration=start, num_iteration=_STEP, raw_score=True)
        measured.append((measure(valid.user, score, label > 0.5), min(start + _STEP, rounds)))
    return max((m for m in measured if not np.isnan(m[0])), default=(0.0, rounds))[1]
