"""A/A tests: coverage of 95 % intervals where there is no effect (Kohavi, Tang and Xu, 2020, chapter 19).

One policy serves all users once; each test then assigns them to two arms independently. The true difference is zero for
any metric, so a valid 95 % interval contains zero in 95 % of the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmrf_jax.abtest import assignment, statistics
from mmrf_jax.io import tables
from mmrf_jax.signals import Signals

_ARMS = ("A", "B")


def coverage(
    signals: Signals, sums: Mapping[str, np.ndarray], tests: int, covariate: np.ndarray | None = None
) -> dict[str, Any]:
    """Compute the share of tests whose interval contains zero, by metric.

    Args:
      signals: of the sums.
      sums: `user_id` [n] and keys of `statistics.sums_of`, [n] each.
      tests: number of assignments; each uses a different hash.
      covariate: [n] or [n, P], for CUPED.

    Returns:
      {"aa": {metric: {"coverage", "half_width": mean half-width of the intervals, in %}}, "tests": number,
      "mismatches": share of tests whose sample ratio has a p-value below `assignment.MISMATCH`, "left_out": {metric:
      reason} for those that had no interval in some test}.

    Raises:
      ValueError: for fewer than one test, or fewer than two users in an arm.
    """
    if tests < 1:
        raise ValueError(f"{tests} A/A tests; use 1 or more")
    values = {key: x for key, x in sums.items() if key not in ("user_id", "exposures")}
    inside: dict[str, list[bool]] = {}
    widths: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}
    mismatches = 0
    for number in range(tests):
        arm = assignment.assign(sums["user_id"], [0.5, 0.5], f"A/A test {number}")
        rows = {name: arm == i for i, name in enumerate(_ARMS)}
        test = statistics.ABTest(signals, _ARMS, "A", paired=False)
        test.update(
            {name: {key: x[here] for key, x in values.items()} for name, here in rows.items()},
            None if covariate is None else {name: covariate[here] for name, here in rows.items()},
        )
        for metric, entry in test.ratios()["B"].items():
            if entry["ci95"] is None:
                left_out.setdefault(metric, entry["note"])
            else:
                low, high = entry["ci95"]
                inside.setdefault(metric, []).append(low <= 0.0 <= high)
                widths.setdefault(metric, []).append((high - low) / 2)
        mismatches += assignment.sample_ratio_mismatch(list(test.users().values()), [0.5, 0.5]) < assignment.MISMATCH
    found = {
        metric: {"coverage": float(np.mean(hits)), "half_width": float(np.mean(widths[metric]))}
        for metric, hits in inside.items()
        if metric not in left_out
    }
    return {"aa": found, "tests": tests, "mismatches": mismatches / tests, "left_out": left_out}


def format_aa(result: Mapping[str, Any]) -> str:
    """Format the result of `coverage` as a Markdown table."""
    rows = [[name, f"{x['coverage']:.3f}", f"{x['half_width']:.2f}"] for name, x in result["aa"].items()]
    rows += [[name, note, "–"] for name, note in result.get("left_out", {}).items()]
    return tables.markdown(["metric", f"coverage of {result['tests']} A/A tests", "half-width, %"], rows)
