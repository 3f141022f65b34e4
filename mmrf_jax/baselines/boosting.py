"""Gradient boosting on plain features: what a ranking engineer would try first, and what agents must beat offline.

LightGBM (Ke et al., 2017) on running means of feedback up to the day before, duration, context, and user columns; a
model for each signal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mmrf_jax import types
from mmrf_jax.data import sessions, statistics
from mmrf_jax.data.records import num_exposures
from mmrf_jax.data.schema import SessionLog

SIGNALS = ("click", "long_view", "like", "profile_enter", "watch_time")
_ROUNDS = 600
_STEP = 25  # rounds between two looks at the validation day
_MAX_ROWS = 1_000_000  # exposures fitted on, and scored at a time
_USER_PRIOR = 5.0  # exposures' worth of the overall mean in a user's means
_PARAMETERS: dict[str, Any] = {
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
    log: SessionLog, items: types.Items, past: list[SessionLog], rows: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """One row for each exposure of a log (`sessions.exposure_index`), or those of `rows`, [n, F] float32.

    Running means of `statistics.SIGNALS`, and counts, of the video, its author, its tag and the user over the exposures
    of `past` logs on *earlier days*; the video's duration and features; the request's context; the user's profile.
    """
    known, mine = statistics.exposures(past), statistics.exposures([log])
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


def labels(log: SessionLog, rows: np.ndarray | slice = slice(None)) -> dict[str, np.ndarray]:
    """What each model is fitted to, {signal: [n]}: 0 or 1, and log1p of seconds."""
    _, request, slot = sessions.exposure_index(log)
    feedback = log.feedback[request[rows], slot[rows]]
    out = {name: feedback[:, types.signal_index(name)].astype(np.float64) for name in SIGNALS}
    return out | {"watch_time": np.log1p(out["watch_time"])}


def scores(
    train: SessionLog,
    valid: SessionLog | None,
    tests: dict[str, SessionLog],
    items: types.Items,
    measure: Callable[[np.ndarray, np.ndarray, np.ndarray], float],
    seed: int = 0,
    rounds: int = _ROUNDS,
) -> dict[str, dict[str, np.ndarray]]:
    """Scores of the exposures of test logs, {log: {signal: [n]}}: log-odds, and expected log1p seconds.

    A signal with a single label among the training rows has no scores.

    Args:
      train: log to fit on, or a sample of its exposures where there are more than a million.
      valid: log to choose the number of rounds on; None for all of them.
      tests: logs to score. Their own feedback is never a feature.
      items: of the videos; statistics are made here.
      measure: (users, scores, labels) [n] -> the figure that is chosen by; NaN where there is none.
      rounds: the most trees of a model.
    """
    import lightgbm

    past = [train] if valid is None else [train, valid]
    rows = np.arange(num_exposures(train))
    if len(rows) > _MAX_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, _MAX_ROWS, replace=False))
    at_train, label = features(train, items, [train], rows), labels(train, rows)
    at_valid = None if valid is None else features(valid, items, past)
    models = {}
    for name in SIGNALS:
        if len(np.unique(label[name])) < 2:
            continue
        objective = "regression" if name == "watch_time" else "binary"
        data = lightgbm.Dataset(at_train, label[name])
        model = lightgbm.train(_PARAMETERS | {"objective": objective, "seed": seed}, data, rounds)
        models[name] = model, rounds if valid is None else _best(model, name, valid, at_valid, measure, rounds)
    result: dict[str, dict[str, np.ndarray]] = {}
    for log_name, log in tests.items():
        blocks = np.array_split(np.arange(num_exposures(log)), -(-num_exposures(log) // _MAX_ROWS))
        scored: dict[str, list[np.ndarray]] = {signal: [] for signal in models}
        for block in blocks:
            x = features(log, items, past, block)
            for name, (model, trees) in models.items():
                scored[name].append(np.asarray(model.predict(x, num_iteration=trees, raw_score=True)))
        result[log_name] = {signal: np.concatenate(parts) for signal, parts in scored.items()}
    return result


def _best(model, name: str, valid: SessionLog, at_valid: np.ndarray | None, measure, rounds: int) -> int:
    """The number of trees with the best validation figure of a signal; all of them where there is no figure."""
    users, label = valid.user_id[sessions.exposure_index(valid)[0]], labels(valid)[name]
    if name == "watch_time":  # above the median: pairs of all rows would take longer and choose alike
        label = label > np.median(label)
    measured = [
        (measure(users, model.predict(at_valid, num_iteration=n, raw_score=True), label > 0.5), n)
        for n in range(_STEP, rounds + 1, _STEP)
    ]
    return max((m for m in measured if not np.isnan(m[0])), default=(0.0, rounds))[1]
