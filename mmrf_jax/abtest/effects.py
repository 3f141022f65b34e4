"""Effects of the arms of an experiment on any per-user metrics, with intervals and p-values of the same test."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from mmrf_jax.abtest import assignment, samples, sequential
from mmrf_jax.estimate import MIN_EVENTS, require

_NAN = math.nan


@dataclasses.dataclass(frozen=True)
class Effect:
    """A metric of an arm and its difference to the control; what is undefined is NaN, and `note` says why.

    `str` gives one line; a format spec, as in `f"{effect:.3f}"`, applies to the value, the difference and its ends.

    Attributes:
      value: mean of the arm, over users; of a ratio metric, the ratio of the sums.
      diff: value minus the control's.
      diff_pct: the same in per cent of the control's.
      low, high: ends of the interval of `diff`.
      p_value: two-sided, of a true difference of 0, by the test of the interval.
      n: users of the arm.
      note: why a number is NaN, or why a covariate adjusts nothing; empty where there is nothing to say.
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
        return format(self, "")

    def __format__(self, spec: str) -> str:
        spec = spec or ".4g"
        text = f"{self.value:{spec}}, {self.diff:+{spec}} [{self.low:+{spec}}, {self.high:+{spec}}] "
        text += f"({self.diff_pct:+.2f} %), p={self.p_value:.3g}, n={self.n}"
        return f"{text} ({self.note})" if self.note else text


def compare(
    arms: Mapping[Any, Any],
    control: Hashable,
    covariate: Hashable | None = None,
    paired: bool = False,
    alpha: float = 0.05,
    *,
    metrics: Mapping[Any, Any] | Sequence[Hashable] | None = None,
    always_valid: bool = False,
    planned_users: float = 10_000,
    holm: bool = False,
) -> dict[Any, dict[Any, Effect]]:
    """Compare the arms of an experiment with the control, metric by metric.

    Welch's t-test for arms of different users, the paired t-test for the same users in the same order. With a
    covariate known before the experiment, CUPED (Deng et al., WSDM 2013) takes out what it explains. A ratio metric is
    tested by the delta method, with users as the units (Deng, Knoblich and Lu, KDD 2018).

    Args:
      arms: {arm: table}, a table being {column: values [n] of the arm's users}, a data frame of pandas, polars or
        pyarrow, or values [n] of one metric, which is then called "value".
      control: the arm that the others are compared with.
      covariate: name of a column that is no metric, such as last week's watch time.
      paired: whether row i is the same user in every arm.
      alpha: 1 minus the coverage of the intervals.
      metrics: {name: column}, {name: (numerator, denominator)} for Σ numerator / Σ denominator, both columns or
        functions, or {name: function of an arm's {column: array}}, which returns [n]; or a list of columns. None: each
        column except the covariate.
      always_valid: whether intervals and p-values hold for any number of interim analyses of a growing test
        (asymptotic confidence sequences, the boundary of the mixture SPRT; see `sequential`).
      planned_users: of all arms together, where always-valid intervals are narrowest. Fix it before the first
        interim analysis: it must not depend on the data.
      holm: whether p-values are adjusted for the number of arms and metrics (Holm, 1979). Intervals stay those of
        single comparisons.

    Returns:
      {arm: {metric: Effect}}, the control included (its differences are 0). Without `holm` an interval excludes 0
      exactly where p_value < alpha. With fewer than 25 users with any of a metric in an arm, both are NaN.

    Raises:
      ValueError: for an unknown control, arms with other columns, or numbers that are not finite.

    Example:
      >>> arms = {"control": {"likes": [0, 1] * 50}, "treatment": {"likes": [1, 1, 1, 0] * 25}}
      >>> effect = compare(arms, control="control")["treatment"]["likes"]
      >>> effect.value, effect.diff, effect.p_value < 0.01
      (0.75, 0.25, True)
    """
    require("alpha", alpha, lambda x: 0 < x < 1, "between 0 and 1, such as 0.05 for intervals of 95 %")
    require("planned_users", planned_users, lambda x: 0 < x < math.inf, "the number of users planned, above 0")
    tables = samples.tables_of(arms, control)
    if covariate is not None and paired:
        raise ValueError(f"covariate={covariate!r}: paired arms have the same users, it adjusts nothing; leave it out")
    parts = samples.parts_of(metrics, tables, control, covariate)
    known = None if covariate is None else {arm: samples.of_users(arm, x, covariate) for arm, x in tables.items()}
    sizes = {arm: samples.rows_of(table) for arm, table in tables.items()}
    if paired and len(set(sizes.values())) > 1:
        raise ValueError(f"paired arms have the same users, but they have {sizes} rows")
    users = sizes[control] if paired else sum(sizes.values())
    test = _Test(paired, alpha, users / planned_users if always_valid else None)
    result: dict[Hashable, dict[Hashable, Effect]] = {arm: {} for arm in tables}
    for metric, part in parts.items():
        with np.errstate(over="ignore", invalid="ignore"):
            found = {arm: samples.sample_of(arm, metric, part, table) for arm, table in tables.items()}
            found = found if known is None else samples.adjusted(found, known, covariate)
            for arm in tables:
                result[arm][metric] = _effect(arm, control, found, test)
    return _holm(result) if holm else result


def sample_ratio_mismatch(counts: Mapping[Any, int], shares: Mapping[Any, float] | None = None) -> float:
    """Return the p-value of a chi-square test that users fell into the arms as intended.

    Below .001 the assignment or the logging is broken (Fabijan et al., KDD 2019).

    Args:
      counts: {arm: users}.
      shares: {arm: intended share}; None for equal ones.

    Raises:
      ValueError: for fewer than two arms, no users, counts that are no numbers of users, or arms without a share.

    Example:
      >>> round(sample_ratio_mismatch({"control": 5012, "treatment": 4988}), 2)
      0.81
    """
    for name, given in (("counts", counts), ("shares", {} if shares is None else shares)):
        if not isinstance(given, Mapping):
            raise ValueError(f"{name} is of type {type(given).__name__}; give a number for each arm, {{arm: number}}")
    for arm, users in counts.items():
        require(f"counts[{arm!r}]", users, lambda x: x >= 0 and x % 1 == 0, "a number of users, 0 or more")
    if shares is not None and set(shares) != set(counts):
        arms = f"shares are of {samples.listed(shares)}, counts of {samples.listed(counts)}"
        raise ValueError(f"{arms}; give a share for each arm")
    for arm, share in ({} if shares is None else shares).items():
        require(f"shares[{arm!r}]", share, lambda x: 0 < x < math.inf, "above 0")
    wanted = [1.0 if shares is None else shares[arm] for arm in counts]
    return assignment.sample_ratio_mismatch(list(counts.values()), wanted)


@dataclasses.dataclass(frozen=True)
class _Test:
    """How a difference is tested; `fraction` of the planned users for always-valid intervals, else None."""

    paired: bool
    alpha: float
    fraction: float | None


def _effect(arm: Hashable, control: Hashable, found: Mapping[Hashable, samples.Sample], test: _Test) -> Effect:
    mine, base = found[arm], found[control]
    n = len(mine.values)
    value = float(mine.values.mean()) if n else _NAN
    if arm == control:
        none = (0.0, 0.0, 0.0, 0.0, 1.0) if math.isfinite(value) else (_NAN,) * 5
        return Effect(value, *none, n, mine.note if n else f"no users in {arm}")
    if not n or not len(base.values):
        return Effect(value, *(_NAN,) * 5, n, f"no users in {control if n else arm}")
    of_control = float(base.values.mean())
    diff = value - of_control
    percent = 100.0 * diff / of_control if of_control else _NAN
    note, error, quantile, p_value = _tested(arm, control, found, test, diff)
    note = note or mine.note or base.note or ("" if of_control else f"no per cent: the value of {control} is 0")
    return Effect(value, diff, percent, diff - quantile * error, diff + quantile * error, p_value, n, note)


def _tested(
    arm: Hashable, control: Hashable, found: Mapping[Hashable, samples.Sample], test: _Test, diff: float
) -> tuple[str, float, float, float]:
    """Return (why there is no interval, standard error of the difference, half-width in errors, p-value)."""
    mine, base = found[arm], found[control]
    if math.isnan(diff):
        return mine.note or base.note, _NAN, _NAN, _NAN
    scarce = min((control, arm), key=lambda name: found[name].events)
    if found[scarce].events < MIN_EVENTS:
        note = f"no interval: {found[scarce].events} users of {scarce} have any, it needs {MIN_EVENTS}"
        return note, _NAN, _NAN, _NAN
    parts = [(mine.values, mine.scale), (base.values, base.scale)]
    if test.paired:
        parts = [(mine.values - base.values, mine.scale + base.scale)]
    if not any(samples.differ(values, scale) for values, scale in parts):
        return "no interval: all users are alike", _NAN, _NAN, _NAN
    counts = [len(values) for values, _ in parts]
    variances = [float(values.var(ddof=1)) / count for (values, _), count in zip(parts, counts, strict=True)]
    error = math.sqrt(sum(variances))
    if not math.isfinite(error) or error == 0.0:
        return "no interval: the numbers are too large or too small for it", _NAN, _NAN, _NAN
    if test.fraction is not None:
        quantile = sequential.quantile(test.fraction, test.alpha)
        return "", error, quantile, sequential.p_value(diff / error, test.fraction, test.alpha)
    # Welch and Satterthwaite's degrees of freedom; n − 1 for one variance.
    shares = [x / sum(variances) for x in variances]
    freedom = 1.0 / sum(share**2 / (count - 1) for share, count in zip(shares, counts, strict=True))
    quantile = float(special.stdtrit(freedom, 1.0 - test.alpha / 2))
    return "", error, quantile, float(2.0 * special.stdtr(freedom, -abs(diff / error)))


def _holm(result: dict[Hashable, dict[Hashable, Effect]]) -> dict[Hashable, dict[Hashable, Effect]]:
    """Adjust the p-values of all arms but the control, and of all metrics (Holm, Scand. J. Statist. 1979)."""
    tested = [
        (effect.p_value, arm, metric)
        for arm, effects in result.items()
        for metric, effect in effects.items()
        if not math.isnan(effect.p_value) and (effect.low, effect.high) != (0.0, 0.0)  # the control's are both 0
    ]
    least = 0.0
    for rank, (p_value, arm, metric) in enumerate(sorted(tested, key=lambda x: x[0])):
        least = max(least, min(1.0, (len(tested) - rank) * p_value))
        result[arm][metric] = dataclasses.replace(result[arm][metric], p_value=least)
    return result
