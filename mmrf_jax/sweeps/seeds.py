"""Aggregation over seeds: means, and differences to a reference with intervals over the seeds.

Each seed repeats the whole experiment: logs, initial parameters and the users of its A/B test. Within a seed, arms
share users and random numbers, so a seed gives one paired difference. Student's t interval over these covers the
randomness of training as well as of users. There is no interval for fewer than `MIN_SEEDS` seeds, or if it would
contain 0 and be wider than `TOO_WIDE`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from mmrf_jax.abtest import statistics
from mmrf_jax.io import tables
from mmrf_jax.signals import SHORT_VIDEO

MIN_SEEDS = 3  # with two, Student's interval is ±12.7 standard errors
TOO_WIDE = 100.0  # percentage points


def across_seeds(
    by_seed: Sequence[Mapping[str, Mapping[str, float | None]]],
    reference: str,
    against: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Compute means over seeds, and each arm's difference to the reference.

    Args:
      by_seed: for each seed, {arm: {metric: value}}, None if there is no value.
      reference: one of the arms.
      against: other references for some of the arms, {arm: its reference}.

    Returns:
      {arm: {metric: {"mean", "diff_pct", "ci95", "by_seed"}}}; `diff_pct` is the mean over seeds of
      100 (value / the reference's − 1), `ci95` its 95 % interval, at least −100 % if values are not negative. It is
      None, and `note` gives the reason, if the reference is 0 or None, if there are too few seeds, or if the interval
      is too wide. `by_seed` are the values; if one is None, so is the mean.

    Raises:
      ValueError: for no seeds, or a reference that is not an arm.
    """
    if not by_seed or reference not in by_seed[0]:
        raise ValueError(f"{len(by_seed)} seeds, and reference {reference!r}; name an arm of at least one seed")
    against, result = against or {}, dict[str, dict[str, Any]]()
    for arm, metrics in by_seed[0].items():
        result[arm], names = {}, (arm, against.get(arm, reference))
        for metric in metrics:
            # None becomes NaN; the mean is then None.
            values, base = (np.array([seed[name][metric] for seed in by_seed], float) for name in names)
            mean = None if np.isnan(values).any() else values.mean()
            entry: dict[str, Any] = {"mean": mean, "diff_pct": None, "ci95": None}
            if np.isnan(base + values).any():
                entry["note"] = "none: a seed has no value"
            elif not base.all():
                entry["note"] = "none: the reference is 0"
            else:
                entry |= _interval(100.0 * (values / base - 1.0), bool((values >= 0.0).all() and (base > 0.0).all()))
            result[arm][metric] = entry | {"by_seed": [None if np.isnan(x) else x for x in values.tolist()]}
    return result


def holm(table: Mapping[str, Mapping[str, Any]], metric: str, against: Mapping[str, str]) -> dict[str, float]:
    """Compute the p-values of a metric's differences, adjusted for their number (Holm, Scand. J. Statist. 1979).

    A difference is of an arm and its reference in percent, paired by seed, and its p-value Student's.

    Args:
      table: of `across_seeds`.
      metric: one of its metrics.
      against: {arm: its reference}, the comparisons.

    Returns:
      {arm: adjusted p-value}, for arms with enough seeds; those of one test exceed the 5 % level together with a
      probability of at most 5 %.
    """
    found = {}
    for arm, reference in against.items():
        values, base = (np.array(table[name][metric]["by_seed"], float) for name in (arm, reference))
        diff = values / np.where(base == 0.0, np.nan, base) - 1.0
        if len(diff) >= MIN_SEEDS and np.isfinite(diff).all() and diff.std() > 0.0:
            found[arm] = float(stats.ttest_1samp(diff, 0.0).pvalue)
    least, adjusted = 0.0, {}
    for rank, arm in enumerate(sorted(found, key=found.__getitem__)):
        least = max(least, min(1.0, (len(found) - rank) * found[arm]))
        adjusted[arm] = least
    return adjusted


def _interval(diff: np.ndarray, bounded: bool) -> dict[str, Any]:
    """Return the mean of differences [seeds] in % and its interval; `bounded` if no difference can be below −100 %."""
    mean, seeds = float(diff.mean()), len(diff)
    if seeds < MIN_SEEDS:
        return {"diff_pct": mean, "note": f"too few seeds: {seeds}, an interval needs {MIN_SEEDS}"}
    half = float(stats.t.ppf(0.975, seeds - 1) * diff.std(ddof=1) / np.sqrt(seeds))
    low, high = max(mean - half, -100.0) if bounded else mean - half, mean + half
    if low <= 0.0 <= high and high - low > TOO_WIDE:
        return {"diff_pct": mean, "note": f"too wide: [{low:+.0f}, {high:+.0f}] says nothing"}
    return {"diff_pct": mean, "ci95": [low, high]}


def less_is_better(metric: str) -> bool:
    """Return whether lower values of a metric of the world are better."""
    return metric in statistics.lower_is_better(SHORT_VIDEO)


def format_seeds(
    table: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[str],
    lower_is_better: Callable[[str], bool] = less_is_better,
) -> str:
    """Format arms × metrics in Markdown; a cell is "mean (diff % [low, high])", with better or worse if it excludes 0.

    Args:
      lower_is_better: whether lower values of a metric are better.
    """
    cells = ([arm, *(_cell(row[name], lower_is_better(name)) for name in metrics)] for arm, row in table.items())
    return tables.markdown(["arm", *metrics], cells)


def _cell(entry: Mapping[str, Any], lower_is_better: bool) -> str:
    if entry["mean"] is None:
        return "–"
    text = f"{entry['mean']:.4g}" if entry["mean"] < 1_000 else f"{entry['mean']:,.0f}"
    if not entry["diff_pct"]:
        return text
    text += f" ({entry['diff_pct']:+.2f} %"
    if entry["ci95"] is None:
        return f"{text}, {statistics.reason(entry)})"
    low, high = entry["ci95"]
    said = statistics.verdict(entry["ci95"], lower_is_better)
    return f"{text} [{low:+.2f}, {high:+.2f}]" + (f" {said})" if said else ")")
