"""Gradient boosting on plain features: what a ranking engineer would try first, and what agents must beat offline."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier

from mmrf_jax import types
from mmrf_jax.baselines.popularity import PRIOR_EXPOSURES
from mmrf_jax.data import sessions
from mmrf_jax.data.schema import SessionLog

SIGNALS = ("click", "long_view")
_ITERATIONS = 100
_STEP = 10  # iterations between two looks at the validation day


def features(log: SessionLog, items: types.Items, past: list[SessionLog]) -> np.ndarray:
    """One row for each exposure of a log (`sessions.exposure_index`), [n, F] float32.

    Running means of click and long_view, and counts, of the video, its author and its tag over the exposures of
    `past` logs on *earlier days*; the video's duration and features; the request's context; the user's profile. The
    user's own running mean is left out: it moves against the feedback to come (`sessions.freeze_histories`), and with
    it the ranker is worse than popularity.
    """
    parts = [_exposures(p) for p in past]
    seen_date, seen_video, seen_label = (np.concatenate(x) for x in zip(*parts, strict=True))
    date, video, _ = _exposures(log)
    columns = [
        _running_means(np.asarray(key), seen_date, seen_video, seen_label, date, video)
        for key in (np.arange(items.num_videos), items.author, items.tag)
    ]
    session, request, _ = sessions.exposure_index(log)
    columns += [np.asarray(items.duration)[video][:, None], np.asarray(items.features)[video]]
    columns += [log.context[request], log.profile[session]]
    return np.concatenate(columns, axis=1).astype(np.float32)


def _exposures(log: SessionLog) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    session, request, slot = sessions.exposure_index(log)
    label = log.feedback[request, slot][:, [types.signal_index(s) for s in SIGNALS]]
    return log.date[session], log.candidates[request, log.slate[request, slot]], label


def _running_means(key, seen_date, seen_video, seen_label, date, video) -> np.ndarray:
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
    valid: SessionLog,
    tests: dict[str, SessionLog],
    items: types.Items,
    measure: Callable[[np.ndarray, np.ndarray, np.ndarray], float],
    seed: int = 0,
) -> dict[str, dict[str, np.ndarray]]:
    """Scores of the exposures of test logs, {log: {signal: [n]}}.

    Args:
      train, valid: logs to fit on, and to choose the number of trees on.
      tests: logs to score; the running means of a row hold the days before it, test days included.
      measure: (users, scores, labels) [n] -> the figure that is chosen by; NaN where there is none.
    """
    at_train, at_valid = features(train, items, [train]), features(valid, items, [train, valid])
    users = valid.user_id[sessions.exposure_index(valid)[0]]
    labels = {name: _exposures(log)[2] > 0.5 for name, log in (("train", train), ("valid", valid))}
    at_tests = {name: features(log, items, [train, valid, log]) for name, log in tests.items()}
    result: dict[str, dict[str, np.ndarray]] = {name: {} for name in tests}
    for i, signal in enumerate(SIGNALS):
        model = HistGradientBoostingClassifier(
            learning_rate=0.08, max_iter=_ITERATIONS, min_samples_leaf=50, early_stopping=False, random_state=seed
        ).fit(at_train, labels["train"][:, i])
        measured = [
            (measure(users, p[:, 1], labels["valid"][:, i]), n)
            for n, p in enumerate(model.staged_predict_proba(at_valid), 1)
            if n % _STEP == 0
        ]
        best = max((m for m in measured if not np.isnan(m[0])), default=(0.0, _ITERATIONS))[1]
        for name, x in at_tests.items():
            staged = model.staged_predict_proba(x)
            result[name][signal] = next(p[:, 1] for n, p in enumerate(staged, 1) if n == best)
    return result
