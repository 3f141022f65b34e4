"""Ranking metrics of logged scores. NumPy only: importing this does not import JAX.

Example:
  >>> from mmrf_jax import metrics
  >>> round(metrics.gauc([1, 0, 0, 1], [0.9, 0.2, 0.3, 0.1], ["a", "a", "b", "b"]).value, 2)
  0.5
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable

import numpy as np
from numpy.typing import ArrayLike

from mmrf_jax.estimate import MIN_EVENTS, Estimate, column, require_interval, unit_numbers
from mmrf_jax.metrics import ranking

__all__ = ["gauc", "xauc"]


def gauc(
    y_true: ArrayLike,
    y_score: ArrayLike,
    group: Iterable[Hashable],
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the AUC within each group, averaged over groups weighted by their rows (Zhu et al., KDD 2017).

    Ties count one half, exactly as in `sklearn.metrics.roc_auc_score`. Groups without both classes are left out.

    Args:
      y_true: [n] labels, 0 or 1.
      y_score: [n] scores, higher is ranked higher; infinities are allowed.
      group: [n] ids of any hashable type, such as users.
      level: coverage of the interval, a percentile bootstrap over groups.
      draws: bootstrap samples.
      seed: of the bootstrap.

    Returns:
      The estimate; `n` is the number of groups that count. NaN, with the reason in `note`, if no group counts; the
      interval is NaN for fewer than 25.

    Raises:
      ValueError: for shapes that disagree, missing ids, scores with NaN, or labels other than 0 and 1.

    Example:
      >>> gauc([1, 0, 1, 0], [0.8, 0.1, 0.5, 0.5], [7, 7, 8, 8]).value
      0.75
    """

    labels = column("y_true", y_true)
    wrong = np.flatnonzero((labels != 0) & (labels != 1))
    if len(wrong):
        raise ValueError(f"y_true of row {wrong[0]} is {labels[wrong[0]]}; labels are 0 or 1, so compare with a bound")
    scores = column("y_score", y_score, ("y_true", len(labels)), finite=False)

    def measure(codes: np.ndarray) -> ranking.GroupedMetric:
        return ranking.grouped_auc(codes, scores, {"label": labels})["label"]

    return _grouped(measure, group, len(labels), "no group has both classes", level, draws, seed)


def xauc(
    y_true: ArrayLike,
    y_score: ArrayLike,
    group: Iterable[Hashable],
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the share of pairs within a group that the score orders as the target, weighted by rows (KDD 2022).

    Pairs of equal targets are left out, pairs of equal scores count one half; exact (Zhan et al.).

    Args:
      y_true: [n] numbers, such as seconds played.
      y_score: [n] scores, higher is ranked higher; infinities are allowed.
      group: [n] ids of any hashable type, such as users.
      level: coverage of the interval, a percentile bootstrap over groups.
      draws: bootstrap samples.
      seed: of the bootstrap.

    Returns:
      The estimate; `n` is the number of groups that count. NaN, with the reason in `note`, if no group counts; the
      interval is NaN for fewer than 25.

    Raises:
      ValueError: for shapes that disagree, missing ids, or scores or targets with NaN.

    Example:
      >>> round(xauc([1.0, 2.0, 3.0], [0.1, 0.3, 0.2], ["u", "u", "u"]).value, 3)
      0.667
    """

    targets = column("y_true", y_true, finite=False)
    scores = column("y_score", y_score, ("y_true", len(targets)), finite=False)

    def measure(codes: np.ndarray) -> ranking.GroupedMetric:
        return ranking.grouped_xauc(codes, scores, targets)

    return _grouped(measure, group, len(targets), "no group has two different targets", level, draws, seed)


def _grouped(
    measure: Callable[[np.ndarray], ranking.GroupedMetric],
    group: Iterable[Hashable],
    rows: int,
    nothing: str,
    level: float,
    draws: int,
    seed: int,
) -> Estimate:
    require_interval(level, draws, seed)
    codes = unit_numbers(group, rows=rows)
    found = measure(codes) if rows else ranking.NO_USERS
    if not found.eligible_users:
        return Estimate(math.nan, note=nothing if rows else "no rows")
    if found.eligible_users < MIN_EVENTS:
        note = f"no interval: {found.eligible_users} groups count, it needs {MIN_EVENTS}"
        return Estimate(found.value, n=found.eligible_users, note=note)
    interval = ranking.bootstrap_interval(found.per_user, found.impressions, draws, seed, level)
    return Estimate(found.value, interval.low, interval.high, found.eligible_users)
