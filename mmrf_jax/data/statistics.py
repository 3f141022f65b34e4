"""Running means of feedback per video, author and tag, over the days before a request.

A row of a training day uses only the days before it, so that its features contain no label of its day. Rows of later
days use all training days.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmrf_jax import types
from mmrf_jax.data import sessions
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.signals import Signals

#: Signals of short videos whose means are features: the frequent ones. Of other logs it is all of them.
FREQUENT = ("click", "long_view", "like", "watch_time")
#: Prior weight of the overall mean in each mean, in exposures.
PRIOR = 20.0


class Exposures(NamedTuple):
    """Exposures of logs, one row per exposure."""

    date: np.ndarray  # [n] int32
    user: np.ndarray  # [n] int32
    video: np.ndarray  # [n] int32
    label: np.ndarray  # [n, L] float64, of `averaged`; durations and counts as log1p


def averaged(signals: Signals) -> tuple[str, ...]:
    """Return the L signals whose means are features."""
    return signals.choose(FREQUENT)


def num_features(signals: Signals) -> int:
    """Return the number of features of a video: means of the video, its author and its tag, and counts."""
    return 3 * (len(averaged(signals)) + 1)


def exposures(logs: list[Sessions], signals: Signals) -> Exposures:
    """Return all exposures of some logs."""
    parts = []
    for log in logs:
        session, request, slot = sessions.exposure_index(log)
        feedback = log.feedback[request, slot].astype(np.float64)
        columns = [label_of(signals, name, feedback) for name in averaged(signals)]
        label = np.stack(columns, axis=1)
        video = log.candidates[request, log.slate[request, slot]]
        parts.append((log.date[session], log.user_id[session], video, label))
    return Exposures(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def label_of(signals: Signals, name: str, feedback: np.ndarray) -> np.ndarray:
    """Return a signal [n] of feedback [n, S] as the label of simple predictors: durations and counts as log1p."""
    column = feedback[:, signals.index(name)]
    return np.log1p(np.maximum(column, 0.0)) if signals.index(name) in signals.amounts else column


def shrunken_means(key: np.ndarray, label: np.ndarray, size: int, prior: float = PRIOR) -> np.ndarray:
    """Return means of labels [n, L] by key [n], shrunk to the overall mean, and log1p of counts: [size, L + 1]."""
    count = np.bincount(key, minlength=size).astype(np.float64)
    overall = label.mean(axis=0) if len(label) else np.full(label.shape[1], np.nan)
    total = np.stack([np.bincount(key, weights=column, minlength=size) for column in label.T], axis=1)
    means = (total + prior * overall) / (count + prior)[:, None]
    return np.concatenate([means, np.log1p(count)[:, None]], axis=1)


def running_means(
    past: Exposures, key: np.ndarray, date: np.ndarray, at: np.ndarray, size: int, prior: float = PRIOR
) -> np.ndarray:
    """Return `shrunken_means` for the keys of rows, each over the exposures of earlier days, [n, L + 1].

    Args:
      past: exposures to average.
      key: [past rows] key of each exposure.
      date: [n] day of each row.
      at: [n] key of each row.
      size: number of keys.
      prior: weight of the overall mean, in exposures.
    """
    out = np.empty((len(at), past.label.shape[1] + 1))
    for day in np.unique(date):
        earlier, now = past.date < day, date == day
        if earlier.any():
            out[now] = shrunken_means(key[earlier], past.label[earlier], size, prior)[at[now]]
        else:
            out[now] = [*np.full(past.label.shape[1], 0.5), 0.0]
    return out


def by_day(logs: list[Sessions], items: types.Items, signals: Signals) -> tuple[np.ndarray, np.ndarray]:
    """Return the statistics of every video after each day of some logs, for `types.Items.statistics`.

    Returns:
      Dates [n] int32, in order; and features [n + 1, V, F] float32, where row i uses the first i of these days. Means
      are differences from the overall mean of the same days, divided by their standard deviation over the exposures of
      all days; counts likewise. Row 0 uses no data and is zeros.
    """
    rows, width, number = exposures(logs, signals), len(averaged(signals)) + 1, num_features(signals)
    dates = np.unique(rows.date)
    keys = [np.arange(items.num_videos), np.asarray(items.author), np.asarray(items.tag)]
    out = np.zeros((len(dates) + 1, items.num_videos, number), np.float32)
    for i in range(1, len(dates) + 1):
        past = rows.date <= dates[i - 1]
        overall = np.append(rows.label[past].mean(axis=0), 0.0)
        parts = []
        for key in keys:
            means = shrunken_means(key[rows.video[past]], rows.label[past], int(key.max()) + 1)
            parts.append((means - overall)[key])
        out[i] = np.concatenate(parts, axis=1)
    last = out[-1][rows.video] if len(dates) else np.zeros((1, number))
    equal = last.max(axis=0) == last.min(axis=0)  # for all videos, as with a single tag: such a column is 0
    scale = np.where(equal, np.inf, np.maximum(last.std(axis=0), 1e-6))
    centre = np.where(np.arange(number) % width == width - 1, last.mean(axis=0), 0.0)
    out[1:] = (out[1:] - centre) / scale
    return dates.astype(np.int32), out
