"""Text summary of an A/B test: metrics, sample ratio, interim analyses, days."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmrf_jax.abtest import aa, assignment, by_day, statistics
from mmrf_jax.io import tables


def daily(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the metrics that are listed by day."""
    main = statistics.main_metric(result)
    return (main, "depth", "visits", f"{main}_per_day")


def describe(result: Mapping[str, Any]) -> str:
    """Return the text for a result of `simulate_ab_test`, `simulate_ab_test_by_day` or `aa.coverage`."""
    if "aa" in result:
        chance = 1.96 * (0.95 * 0.05 / result["tests"]) ** 0.5
        said = f"right intervals have a coverage in .95 ± {chance:.3f} 95 times of a hundred"
        alarms = f"sample ratios with p < {assignment.MISMATCH}: {result['mismatches']:.2%}"
        return f"{aa.format_aa(result)}\n{said}; {alarms}"
    parts = [statistics.format_ab_test(result), *filter(None, [_scarce(result), statistics.too_small(result)])]
    parts.append(_sample_ratio(result))
    cut = {name: round(value, 3) for name, value in result["truncated_pct"].items()}
    parts.append(f"sessions cut at their longest, %: {cut}")
    if "interim_analyses" in result:
        parts.append(_interim_analyses(result["interim_analyses"], statistics.main_metric(result)))
    if "by_day" in result:
        parts += [f"\n{by_day.format_days(result, metric)}" for metric in daily(result)]
    if "novelty_effect" in result:
        parts.append(_novelty_effect(result["novelty_effect"], daily(result)))
    return "\n".join(parts)


def _scarce(result: Mapping[str, Any]) -> str:
    """Return the metrics with too few events, on one line."""
    notes: dict[str, list[str]] = {}
    for arm, metrics in result["ab_test"].items():
        for metric, entry in metrics.items():
            if "note" in entry:
                notes.setdefault(statistics.reason(entry), []).append(f"{metric} of {arm}")
    said = [f"{why}: {', '.join(names)}" for why, names in notes.items()]
    return (
        f"no interval ({statistics.MIN_EVENTS} users of each arm need to have any) — {'; '.join(said)}" if said else ""
    )


def _sample_ratio(result: Mapping[str, Any]) -> str:
    if "sample_ratio_mismatch" not in result:
        return "sample ratio: not applicable, every arm has the same users"
    p, users = result["sample_ratio_mismatch"]["p_value"], result["sample_ratio_mismatch"]["users"]
    line = f"sample ratio: users {users}, p = {p:.4f}"
    if p < assignment.MISMATCH:
        line += f"\nWARNING: sample ratio mismatch (p < {assignment.MISMATCH}): trust no metric of this test"
    return line


def _interim_analyses(analyses: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Return, for each arm, the first interim analysis whose always-valid interval excludes zero."""
    lines = []
    for arm, metrics in analyses[-1]["ab_test"].items():
        entry = metrics[metric]
        if entry["always_valid95"] == [0.0, 0.0]:  # the control
            continue
        text = f"{arm}, {metric}, always valid at the end: "
        if entry["always_valid95"] is None:
            lines.append(text + statistics.reason(entry))
            continue
        low, high = entry["always_valid95"]
        text += f"{entry['diff_pct']:+.2f} % [{low:+.2f}, {high:+.2f}]"
        for number, analysis in enumerate(analyses, 1):
            if statistics.verdict(analysis["ab_test"][arm][metric]["always_valid95"]):
                text += f"; leaves zero out from interim analysis {number} of {len(analyses)} on"
                text += f", {analysis['users'][arm]} users"
                break
        else:
            text += f"; holds zero at all {len(analyses)} interim analyses"
        lines.append(text)
    return "\n".join(lines)


def _novelty_effect(halves: Mapping[str, Any], metrics: Sequence[str]) -> str:
    rows = []
    for arm, entries in halves.items():
        for metric in metrics:
            entry = entries[metric]
            if (entry["change"], entry["early"]) == (0.0, 0.0):  # of the control
                continue
            if entry["change"] is None:
                rows.append([arm, metric, "–", "–", statistics.reason(entry)])
                continue
            low, high = entry["ci95"]
            change = f"{entry['change']:+.2f} [{low:+.2f}, {high:+.2f}]"
            rows.append([arm, metric, f"{entry['early']:+.2f}", f"{entry['late']:+.2f}", change])
    table = tables.markdown(["arm", "metric", "first half", "second half", "change, points"], rows)
    return f"\ndifferences to the control, %, in the first and in the second half of the days after the first:\n{table}"
