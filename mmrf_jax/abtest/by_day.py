"""Persistence of effects in long-running A/B tests: early and late differences to the control, and their change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmrf_jax.abtest import statistics
from mmrf_jax.io import tables
from mmrf_jax.signals import Signals


def novelty_effect(
    signals: Signals,
    early: Mapping[str, Mapping[str, np.ndarray]],
    late: Mapping[str, Mapping[str, np.ndarray]],
    control: str,
    paired: bool,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compute the change of the differences to the control, in %, between two parts of a test with the same users.

    Uses the delta method on each user's four contributions: early and late visitors overlap, so the two differences are
    not independent.

    Args:
      signals: of the sums.
      early: arm -> key of `statistics.sums_of` -> [n] sums over the first part.
      late: the same over the second part; users in the same order.
      control: one of the arms.
      paired: whether all arms have the same users in the same order.

    Returns:
      {arm: {metric: {"early", "late", "change", "ci95"}}}: differences in %, late minus early in percentage points, and
      its 95 % interval; 0 for the control. All four are None, and "note" gives the reason, if in either part fewer than
      `statistics.MIN_EVENTS` users of the arm or of the control have any of the metric.
    """
    result: dict[str, dict[str, dict[str, Any]]] = {arm: {} for arm in early}
    for metric, (top, bottom) in statistics.ratios_of(signals).items():
        if top not in early[control] or bottom not in early[control]:
            continue
        events = {arm: min(int(np.count_nonzero(part[arm][top])) for part in (early, late)) for arm in early}
        for arm in early:
            if arm == control:
                result[arm][metric] = {"early": 0.0, "late": 0.0, "change": 0.0, "ci95": [0.0, 0.0]}
                continue
            if note := statistics.too_few({name: events[name] for name in (control, arm)}):
                result[arm][metric] = dict.fromkeys(("early", "late", "change", "ci95")) | {"note": note}
                continue
            ratio = {a: [_ratio(part[a][top], part[a][bottom]) for part in (early, late)] for a in (control, arm)}
            bases = [base for base, _ in ratio[control]]
            diffs = [100.0 * (value / base - 1.0) for (value, _), base in zip(ratio[arm], bases, strict=True)]
            own = [100.0 * x / base for (_, x), base in zip(ratio[arm], bases, strict=True)]
            other = [
                100.0 * value / base**2 * x for (value, _), (base, x) in zip(ratio[arm], ratio[control], strict=True)
            ]
            own_change, other_change = own[1] - own[0], other[1] - other[0]  # [n] of the arm, of the control
            if paired:
                error = _error(own_change - other_change)
            else:
                error = float(np.hypot(_error(own_change), _error(other_change)))
            moved = diffs[1] - diffs[0]
            result[arm][metric] = {
                "early": diffs[0],
                "late": diffs[1],
                "change": moved,
                "ci95": [moved - statistics.Z95 * error, moved + statistics.Z95 * error],
            }
    return result


def _ratio(top: np.ndarray, bottom: np.ndarray) -> tuple[float, np.ndarray]:
    """Return Σ top / Σ bottom, and each user's linearised contribution [n] to it, times n."""
    value = float(top.sum() / bottom.sum())
    return value, (top - value * bottom) / bottom.mean()


def _error(values: np.ndarray) -> float:
    """Return the standard error of the mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def format_days(result: Mapping[str, Any], metric: str) -> str:
    """Format one metric as a Markdown table of days × arms.

    Args:
      result: from `abtest.simulate_days.simulate_ab_test_by_day`.
      metric: key of its metrics.
    """
    arms, less = list(result["ab_test"]), metric in statistics.lower_is_better(result)
    control = statistics.control_of(result["ab_test"])
    rows = [
        [str(row["day"]), *(statistics.cell(row["ab_test"][arm][metric], less, arm == control) for arm in arms)]
        for row in result["by_day"]
    ]
    return tables.markdown(["day", *(f"{arm}, {metric}" for arm in arms)], rows)
