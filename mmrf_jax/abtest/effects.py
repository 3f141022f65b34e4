"""Effects of the arms of an experiment on any per-user metrics, with intervals and p-values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from mmrf_jax.abtest import assignment
from mmrf_jax.estimate import MIN_EVENTS


@dataclasses.dataclass(frozen=True)
class Effect:
    """A metric of an arm and its difference to the control; what is undefined is NaN, and `note` says why.

    Attributes:
      value: mean of the arm, over users.
      diff: value minus the control's.
      diff_pct: the same in per cent of the control's.
      low, high: ends of the interval of `diff`.
      p_value: two-sided, of a true difference of 0.
      n: users of the arm.
      note: why a number is NaN; empty where none is.
    """

    value: float
    diff: float
    diff_pct: float
    low: float
    high: float
    p_value: float
    n: int
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.value:.4g}, {self.diff:+.4g} [{self.low:+.4g}, {self.high:+.4g}] ({self.diff_pct:+.2f} %), "
        text += f"p={self.p_value:.3g}, n={self.n}"
        return f"{text} ({self.note})" if self.note else text


def compare(
    arms: Mapping[str, Any],
    control: str,
    covariate: str | None = None,
    paired: bool = False,
    alpha: float = 0.05,
) -> dict[str, dict[str, Effect]]:
    """Compare the arms of an experiment with the control, metric by metric.

    Welch's t-test for arms of different users, the paired t-test for the same users in the same order. With a
    covariate known before the experiment, CUPED (Deng et al., WSDM 2013) takes out what it explains.

    Args:
      arms: {arm: {metric: values [n] of its users}}; a data frame is such a mapping.
      control: the arm that the others are compared with.
      covariate: name of a column that is no metric, such as last week's watch time.
      paired: whether row i is the same user in every arm.
      alpha: 1 minus the coverage of the intervals.

    Returns:
      {arm: {metric: Effect}}, the control included (its differences are 0).

    Raises:
      ValueError: for an unknown control, arms with other columns, or numbers that are not finite.

    Example:
      >>> arms = {"control": {"likes": [0, 1] * 50}, "treatment": {"likes": [1, 1, 1, 0] * 25}}
      >>> effect = compare(arms, control="control")["treatment"]["likes"]
      >>> effect.value, effect.diff, effect.p_value < 0.01
      (0.75, 0.25, True)
    """
    if control not in arms:
        raise ValueError(f"control={control!r} is no arm; choose among {', '.join(map(repr, arms))}")
    tables = {arm: _columns(arm, table) for arm, table in arms.items()}
    metrics = [name for name in tables[control] if name != covariate]
    for arm, table in tables.items():
        if set(table) != set(tables[control]):
            raise ValueError(f"arm {arm!r} has columns {sorted(table)}, the control {sorted(tables[control])}")
    if covariate is not None and covariate not in tables[control]:
        raise ValueError(f"covariate={covariate!r} is no column; choose among {', '.join(tables[control])}")
    sizes = {arm: len(next(iter(table.values()))) for arm, table in tables.items()}
    if paired and len(set(sizes.values())) > 1:
        raise ValueError(f"paired arms have the same users, but they have {sizes} rows")
    result: dict[str, dict[str, Effect]] = {arm: {} for arm in tables}
    for metric in metrics:
        values = {arm: table[metric] for arm, table in tables.items()}
        events = {arm: int(np.count_nonzero(x)) for arm, x in values.items()}
        if covariate is not None:
            values = _adjusted(values, {arm: table[covariate] for arm, table in tables.items()})
        for arm in tables:
            result[arm][metric] = _effect(arm, control, values, events, paired, alpha)
    return result


def sample_ratio_mismatch(counts: Mapping[str, int], shares: Mapping[str, float] | None = None) -> float:
    """Return the p-value of a chi-square test that users fell into the arms as intended.

    Below .001 the assignment or the logging is broken (Fabijan et al., KDD 2019).

    Args:
      counts: {arm: users}.
      shares: {arm: intended share}; None for equal ones.

    Raises:
      ValueError: for fewer than two arms, no users, or arms without a share.

    Example:
      >>> round(sample_ratio_mismatch({"control": 5012, "treatment": 4988}), 2)
      0.81
    """
    if shares is not None and set(shares) != set(counts):
        raise ValueError(f"shares are of {sorted(shares)}, counts of {sorted(counts)}; give a share for each arm")
    wanted = [1.0 if shares is None else shares[arm] for arm in counts]
    return assignment.sample_ratio_mismatch(list(counts.values()), wanted)


def _columns(arm: str, table: Any) -> dict[str, np.ndarray]:
    names = list(getattr(table, "columns", table))
    columns = {str(name): np.asarray(table[name], np.float64) for name in names}
    if not columns or len({x.shape for x in columns.values()}) > 1 or next(iter(columns.values())).ndim != 1:
        shapes = {name: x.shape for name, x in columns.items()}
        raise ValueError(f"arm {arm!r} has columns of shapes {shapes}; give one number for each user")
    for name, x in columns.items():
        if not np.isfinite(x).all():
            raise ValueError(f"{name} of arm {arm!r} has {int((~np.isfinite(x)).sum())} numbers that are not finite")
    return columns


def _adjusted(values: dict[str, np.ndarray], x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """CUPED: values minus θ (x − mean of x over all arms), θ the pooled within-arm regression."""
    centred = {arm: part - part.mean() for arm, part in x.items()}
    spread = sum(float(part @ part) for part in centred.values())
    if spread == 0.0:
        return values
    theta = sum(float(centred[arm] @ values[arm]) for arm in values) / spread
    overall = np.concatenate(list(x.values())).mean()
    return {arm: values[arm] - theta * (x[arm] - overall) for arm in values}


def _effect(
    arm: str, control: str, values: dict[str, np.ndarray], events: dict[str, int], paired: bool, alpha: float
) -> Effect:
    mine, base = values[arm], values[control]
    value, diff = float(mine.mean()), float(mine.mean() - base.mean())
    percent = 100.0 * diff / float(base.mean()) if base.mean() != 0.0 else math.nan
    if arm == control:
        return Effect(value, 0.0, 0.0, 0.0, 0.0, 1.0, len(mine))
    scarce = min((control, arm), key=lambda name: events[name])
    if events[scarce] < MIN_EVENTS:
        note = f"no interval: {events[scarce]} users of {scarce} have any, it needs {MIN_EVENTS}"
        return Effect(value, diff, percent, math.nan, math.nan, math.nan, len(mine), note)
    spread = [np.ptp(mine - base)] if paired else [np.ptp(mine), np.ptp(base)]
    if not any(spread):
        note = "no interval: all users are alike"
        return Effect(value, diff, percent, math.nan, math.nan, math.nan, len(mine), note)
    test = stats.ttest_rel(mine, base) if paired else stats.ttest_ind(mine, base, equal_var=False)
    low, high = test.confidence_interval(1.0 - alpha)
    return Effect(value, diff, percent, float(low), float(high), float(test.pvalue), len(mine))
