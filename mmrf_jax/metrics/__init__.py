"""Ranking metrics of logged scores. NumPy only: importing this does not import JAX.

Example:
  >>> from mmrf_jax import metrics
  >>> round(metrics.gauc([1, 0, 0, 1], [0.9, 0.2, 0.3, 0.1], ["a", "a", "b", "b"]).value, 2)
  0.5
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from mmrf_jax.estimate import MIN_EVENTS, Estimate, unit_numbers
from mmrf_jax.metrics import ranking

__all__ = ["gauc", "xauc"]


def gauc(
    y_true: Sequence[Any],
    y_score: Sequence[Any],
    group: Sequence[Hashable],
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the AUC within each group, averaged over groups weighted by their rows (Zhu et al., KDD 2017).

    Ties count one half, exactly as in `sklearn.metrics.roc_auc_score`. Groups without both classes are left out.

    Args:
      y_true: [n] labels, 0 or 1.
      y_score: [n] scores, higher is ranked higher.
      group: [n] ids of any hashable type, such as users.
      level: coverage of the interval, a percentile bootstrap over groups.
      draws: bootstrap samples.
      seed: of the bootstrap.

    Returns:
      The estimate; `n` is the number of groups that count.

    Raises:
      ValueError: for shapes that disagree, scores with NaN, or labels other than 0 and 1.

    Example:
      >>> gauc([1, 0, 1, 0], [0.8, 0.1, 0.5, 0.5], [7, 7, 8, 8]).value
      0.75
    """

    def measure(codes: np.ndarray) -> ranking.GroupedMetric:
        return ranking.grouped_auc(codes, np.asarray(y_score, float), {"label": np.asarray(y_true)})["label"]

    return _grouped(measure, group, "no group has both classes", level, draws, seed)


def xauc(
    y_true: Sequence[Any],
    y_score: Sequence[Any],
    group: Sequence[Hashable],
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the share of pairs within a group that the score orders as the target, weighted by rows (KDD 2022).

    Pairs of equal targets are left out, pairs of equal scores count one half; exact (Zhan et al.).

    Args:
      y_true: [n] numbers, such as seconds played.
      y_score: [n] scores, higher is ranked higher.
      group: [n] ids of any hashable type, such as users.
      level: coverage of the interval, a percentile bootstrap over groups.
      draws: bootstrap samples.
      seed: of the bootstrap.

    Returns:
      The estimate; `n` is the number of groups that count.

    Raises:
      ValueError: for shapes that disagree, or scores or targets with NaN.

    Example:
      >>> round(xauc([1.0, 2.0, 3.0], [0.1, 0.3, 0.2], ["u", "u", "u"]).value, 3)
      0.667
    """

    def measure(codes: np.ndarray) -> ranking.GroupedMetric:
        return ranking.grouped_xauc(codes, np.asarray(y_score, float), np.asarray(y_true, float))

    return _grouped(measure, group, "no group has two different targets", level, draws, seed)


def _grouped(
    measure: Callable[[np.ndarray], ranking.GroupedMetric],
    group: Sequence[Hashable],
    nothing: str,
    level: float,
    draws: int,
    seed: int,
) -> Estimate:
    found = measure(unit_numbers(group))
    if not found.eligible_users:
        return Estimate(float("nan"), note=nothing)
    if found.eligible_users < MIN_EVENTS:
        note = f"no interval: {found.eligible_users} groups count, it needs {MIN_EVENTS}"
        return Estimate(found.value, n=found.eligible_users, note=note)
    interval = ranking.bootstrap_interval(found.per_user, found.impressions, draws, seed, level)
    return Estimate(found.value, interval.low, interval.high, found.eligible_users)
