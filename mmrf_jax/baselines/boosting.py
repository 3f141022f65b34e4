"""Gradient boosting on plain features: what a ranking engineer would try first, and what agents must beat offline."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from mmrf_jax import types
from mmrf_jax.baselines.popularity import PRIOR_EXPOSURES
from mmrf_jax.data import sessions
from mmrf_jax.data.records import num_exposures
from mmrf_jax.data.schema import SessionLog

SIGNALS = ("click", "long_view")
_ITERATIONS = 100
_STEP = 10  # iterations between two looks at the validation day
_MAX_ROWS = 1_000_000  # exposures fitted on, and scored at a time


def features(
    log: SessionLog, items: types.Items, past: list[SessionLog], rows: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """One row for each exposure of a log (`sessions.exposure_index`), or those of `rows`, [n, F] float32.

    Running means of click and long_view, and counts, of the video, its author and its tag over the exposures of
    `past` logs on *earlier days*; the video's duration and features; the request's context; the user's profile. The
    user's own running mean is left out: it moves against the feedback to come (`sessions.freeze_histories`), and with
    it the ranker is worse than popularity.
    """
    parts = [exposures(p) for p in past]
    seen_date, seen_video, seen_label = (np.concatenate(x) for x in zip(*parts, strict=True))
    date, video = (x[rows] for x in exposures(log)[:2])
    columns = [
        running_means(np.asarray(key), seen_date, seen_video, seen_label, date, video)
        for key in (np.arange(items.num_videos), items.author, items.tag)
    ]
    session, request = (x[rows] for x in sessions.exposure_index(log)[:2])
    columns += [np.asarray(items.duration)[video][:, None], np.asarray(items.features)[video]]
    columns += [log.context[request], log.profile[session]]
    return np.concatenate([column.astype(np.float32) for column in columns], axis=1)


def exposures(log: SessionLog) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    session, request, slot = sessions.exposure_index(log)
    label = log.feedback[request, slot][:, [types.signal_index(s) for s in SIGNALS]]
    return log.date[session], log.candidates[request, log.slate[request, slot]], label


def running_means(key, seen_date, seen_video, seen_label, date, video) -> np.ndarray:
    """[n, L + 1] smoothed means of the labels of a key's exposures before each row's day, and log1p of their number."""
    size = int(key.max()) + 1
    out = np.empty((len(video), len(SIGNALS) + 1))
    for day in np.unique(date):
        earlier, now = seen_date < day, date == day
        rows = key[seen_video[earlier]]
        count = np.bincount(rows, minlength=size)
        overall = seen_label[earlier].mean(axis=0) if earlier.any() else np.full(len(SIGNALS), 0.5)
        for i, prior in enumerate(overall):
            total = np.bincount(rows, weights=seen_label[earlier, i], minlength=size)
            out[now, i] = ((total + PRIOR_EXPOSURES * prior) / (count + PRIOR_EXPOSURES))[key[video[now]]]
        out[now, -1] = np.log1p(count)[key[video[now]]]
    return out


def scores(
    train: SessionLog,
    valid: SessionLog | None,
    tests: dict[str, SessionLog],
    items: types.Items,
    measure: Callable[[np.ndarray, np.ndarray, np.ndarray], float],
    seed: int = 0,
) -> dict[str, dict[str, np.ndarray]]:
    """Scores of the exposures of test logs, {log: {signal: [n]}}.

    Args:
      train: log to fit on, or a sample of its exposures where there are more than a million.
      valid: log to choose the number of trees on; None for all of them.
      tests: logs to score; the running means of a row hold the days before it, test days included.
      measure: (users, scores, labels) [n] -> the figure that is chosen by; NaN where there is none.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    past = [train] if valid is None else [train, valid]
    rows = np.arange(num_exposures(train))
    if len(rows) > _MAX_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, _MAX_ROWS, replace=False))
    at_train, labels = features(train, items, [train], rows), exposures(train)[2][rows] > 0.5
    at_valid = None if valid is None else features(valid, items, past)
    models = {}
    for i, signal in enumerate(SIGNALS):
        model = HistGradientBoostingClassifier(
            learning_rate=0.08, max_iter=_ITERATIONS, min_samples_leaf=50, early_stopping=False, random_state=seed
        ).fit(at_train, labels[:, i])
        models[signal] = (model, _ITERATIONS if valid is None else _best(model, i, valid, at_valid, measure))
    result: dict[str, dict[str, np.ndarray]] = {}
    for name, log in tests.items():
        blocks = np.array_split(np.arange(num_exposures(log)), -(-num_exposures(log) // _MAX_ROWS))
        scored: dict[str, list[np.ndarray]] = {signal: [] for signal in SIGNALS}
        for block in blocks:
            x = features(log, items, [*past, log], block)
            for signal, (model, trees) in models.items():
                scored[signal].append(next(itertools.islice(model.staged_predict_proba(x), trees - 1, None))[:, 1])
        result[name] = {signal: np.concatenate(parts) for signal, parts in scored.items()}
    return result


def _best(model, i: int, valid: SessionLog, at_valid: np.ndarray | None, measure) -> int:
    """The number of trees with the best validation figure of signal i; all of them where there is no figure."""
    users = valid.user_id[sessions.exposure_index(valid)[0]]
    label = exposures(valid)[2][:, i] > 0.5
    measured = [
        (measure(users, p[:, 1], label), n)
        for n, p in enumerate(model.staged_predict_proba(at_valid), 1)
        if n % _STEP == 0
    ]
    return max((m for m in measured if not np.isnan(m[0])), default=(0.0, _ITERATIONS))[1]
