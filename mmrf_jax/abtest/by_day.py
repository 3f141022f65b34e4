"""Whether the effects of a long-running test last: differences to the control early and late, and their change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmrf_jax.abtest import statistics


def change(
    early: Mapping[str, Mapping[str, np.ndarray]],
    late: Mapping[str, Mapping[str, np.ndarray]],
    control: str,
    paired: bool,
) -> dict[str, dict[str, dict[str, Any]]]:
    """How the differences to the control in % move from one part of a test to another, of the same users.

    The delta method on each user's four contributions: those who come early also come late, so the two differences are
    not independent.

    Args:
      early, late: arm -> key of `ab_test.SUMS` -> [n] sums over the part; users in the same order in both.
      control: one of the arms. paired: whether all arms have the same users in the same order.

    Returns:
      {arm: {metric: {"early", "late", "change", "ci95"}}}: differences in %, the late one minus the early one in
      percentage points, and the 95 % interval of that; 0 for the control. All four are None, and "note" says why, where
      fewer than `ab_test.MIN_EVENTS` users of the arm or the control have any of the metric in a part.
    """
    result: dict[str, dict[str, dict[str, Any]]] = {arm: {} for arm in early}
    for metric, (top, bottom) in statistics.RATIOS.items():
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
    """Σ top / Σ bottom, and what each user [n] moves it by, times n."""
    value = float(top.sum() / bottom.sum())
    return value, (top - value * bottom) / bottom.mean()


def _error(values: np.ndarray) -> float:
    """Standard error of a mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def format_table(result: Mapping[str, Any], metric: str) -> str:
    """Days × arms as a Markdown table of one metric.

    Args:
      result: of `abtest.simulate_days.compare`. metric: key of its metrics.
    """
    arms = list(result["ab_test"])
    lines = [f"| day | {' | '.join(f'{arm}, {metric}' for arm in arms)} |", "|---" * (1 + len(arms)) + "|"]
    for row in result["by_day"]:
        cells = [statistics.cell(row["ab_test"][arm][metric], metric) for arm in arms]
        lines.append(f"| {row['day']} | {' | '.join(cells)} |")
    return "\n".join(lines)
