"""Results of several seeds in one table: means, and differences to a reference with intervals over the seeds.

A seed is a whole repetition: logs, initial parameters and the users of its A/B test. Within a seed arms share users and
chance, so a seed gives one paired difference; the interval is Student's over those, and holds the chance of training
as well as that of users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats


def across(
    by_seed: Sequence[Mapping[str, Mapping[str, float]]], reference: str, against: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Means over seeds, and what each arm has more than the reference.

    Args:
      by_seed: for each seed, {arm: {metric: value}}, None where there is none.
      reference: one of the arms. against: another one in its place for some of the arms, {arm: its reference}.

    Returns:
      {arm: {metric: {"mean", "diff_pct", "ci95", "by_seed"}}}; `diff_pct` is the mean over seeds of
      100 (value / the reference's − 1), `ci95` its 95 % interval: [None, None] for one seed, and where the reference
      is 0 or None. `by_seed` are the values; where one is None, so is the mean.

    Raises:
      ValueError: for no seeds, or a reference that is no arm.
    """
    if not by_seed or reference not in by_seed[0]:
        raise ValueError(f"{len(by_seed)} seeds, and reference {reference!r}; name an arm of at least one seed")
    against, result = against or {}, dict[str, dict[str, Any]]()
    for arm, metrics in by_seed[0].items():
        result[arm], names = {}, (arm, against.get(arm, reference))
        for metric in metrics:
            # None becomes NaN, and then the mean of all is None again.
            values, base = (np.array([seed[name][metric] for seed in by_seed], float) for name in names)
            mean = None if np.isnan(values).any() else values.mean()
            entry: dict[str, Any] = {"mean": mean, "diff_pct": None, "ci95": [None, None]}
            if (base != 0.0).all() and not np.isnan(base + values).any():
                diff = 100.0 * (values / base - 1.0)
                entry["diff_pct"] = diff.mean()
                if len(diff) > 1:
                    half = stats.t.ppf(0.975, len(diff) - 1) * diff.std(ddof=1) / np.sqrt(len(diff))
                    entry["ci95"] = [diff.mean() - half, diff.mean() + half]
            result[arm][metric] = entry | {"by_seed": [None if np.isnan(x) else x for x in values.tolist()]}
    return result


def format_table(table: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """Arms × metrics in Markdown; a cell is "mean (diff % [low, high])"."""
    lines = ["| arm | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    lines += [f"| {arm} | " + " | ".join(_cell(row[name]) for name in metrics) + " |" for arm, row in table.items()]
    return "\n".join(lines)


def _cell(entry: Mapping[str, Any]) -> str:
    if entry["mean"] is None:
        return "–"
    text = f"{entry['mean']:.4g}" if entry["mean"] < 1_000 else f"{entry['mean']:,.0f}"
    if not entry["diff_pct"]:
        return text
    low, high = entry["ci95"]
    return f"{text} ({entry['diff_pct']:+.2f} %" + ("" if low is None else f" [{low:+.2f}, {high:+.2f}]") + ")"
