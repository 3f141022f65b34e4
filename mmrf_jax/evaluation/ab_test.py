"""Statistics of an A/B test: differences to the control in % with 95 % intervals.

Every metric is a ratio of two sums over users — watch time by sessions, likes by exposed videos — so its interval is
the delta method's, users being the independent units (Deng, Knoblich and Lu, "Applying the Delta Method in Metric
Analytics", KDD 2018). Only means and covariances of per-user sums are needed: `ABTest` collects them block by block,
`compare` does it in one call. Coverage and Gini are of `catalogue`, assignment to arms and its check of `assignment`,
intervals that may be looked at again and again of `sequential`.

Letters: n users of an arm, A arms, M columns of per-user sums, P covariates, G groups of users, V videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from mmrf_jax.evaluation import catalogue, moments
from mmrf_jax.types import BINARY_SIGNALS

#: Metric -> (numerator, denominator), keys of per-user sums. Interaction rates are per exposed video.
RATIOS = {
    "watch_time": ("watch_time", "sessions"),  # seconds a session
    "depth": ("depth", "sessions"),  # videos a session
    "requests": ("requests", "sessions"),  # requests a session
    **{signal: (signal, "depth") for signal in BINARY_SIGNALS},
    "return_rate": ("returned", "sessions"),  # sessions followed by another within a day
    "ild": ("ild", "requests"),  # intra-list diversity of a slate
    # Of all users of an arm, those who did not come included; `user_days` is days under test, users × days in all.
    "visits": ("sessions", "user_days"),  # sessions a user and day
    "watch_time_per_day": ("watch_time", "user_days"),  # seconds a user and day
}
#: Per-user sums an arm may have; `sessions` is 1 for every user if left out.
SUMS = ("sessions", "watch_time", "depth", "requests", "returned", "ild", *BINARY_SIGNALS, "user_days")
_COVARIATE = "covariate"
Z95 = float(special.ndtri(0.975))  # half-width of an interval in standard errors


class ABTest:
    """Collects per-user sums of all arms, block by block, and compares the arms with the control.

    Memory is (A M)² however many users there are. Results do not depend on the order of users or the cut into blocks,
    beyond float64 rounding.

    Args:
      arms: names; the control is one of them.
      control: name of the arm that the others are compared with.
      paired: True if the arms hold the same users in the same order (a simulator can show every arm to everyone);
        their covariance then narrows the intervals. False if each user is in one arm.

    Raises:
      ValueError: for a control that is not an arm or names that repeat.
    """

    def __init__(self, arms: Sequence[str], control: str, paired: bool):
        self.arms, self.control, self.paired = tuple(arms), control, paired
        if control not in self.arms or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"control {control!r} must be one of the arms {self.arms}, all different")
        self._columns: tuple[str, ...] = ()
        self._moments: dict[str, moments.Moments] = {}  # by arm, or under "" for the columns of all arms side by side
        self._exposures: dict[str, np.ndarray] = {}

    def update(
        self, sums: Mapping[str, Mapping[str, np.ndarray]], covariate: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Adds users.

        Args:
          sums: arm -> key of `SUMS` -> [n] sums over the user's sessions; optionally `user_id` [n], checked to agree
            when paired; optionally `exposures` [G, V], counts by group of users (`rollout.exposure_group`) and video.
          covariate: arm -> [n] or [n, P], known before the test and going with the metrics, such as the watch time of
            the history; CUPED then takes out what they explain.

        Raises:
          ValueError: for missing arms, unknown or differing keys, shapes that disagree, numbers that are not finite.
        """
        if set(sums) != set(self.arms):
            raise ValueError(f"sums are of the arms {sorted(sums)}, expected {sorted(self.arms)}")
        if covariate is not None and self.paired:
            raise ValueError("paired arms have the same users, so a covariate has nothing to adjust; leave it out")
        if covariate is not None and set(covariate) != set(self.arms):
            raise ValueError(f"covariate is of the arms {sorted(covariate)}, expected {sorted(self.arms)}")
        tables = {}
        for arm in self.arms:
            columns, tables[arm] = _table(arm, sums[arm], None if covariate is None else covariate[arm])
            self._columns = self._columns or columns
            if columns != self._columns:
                raise ValueError(f"arm {arm!r} has sums {columns}, another arm or block has {self._columns}")
        if self.paired:
            control = self.control
            for arm in self.arms:
                if len(tables[arm]) != len(tables[control]) or not np.array_equal(
                    sums[arm].get("user_id", ()), sums[control].get("user_id", ())
                ):
                    raise ValueError(
                        f"paired arms need the same users in the same order: {arm!r} has {len(tables[arm])}, "
                        f"{control!r} {len(tables[control])}; use paired=False for different users"
                    )
            tables = {"": np.concatenate([tables[arm] for arm in self.arms], axis=1)}
        for name, table in tables.items():
            self._moments.setdefault(name, moments.Moments(table.shape[1])).update(table)
        for arm in self.arms:
            if "exposures" in sums[arm]:
                counts = np.asarray(sums[arm]["exposures"], np.int64)
                self._exposures[arm] = self._exposures.get(arm, 0) + counts

    def users(self) -> dict[str, int]:
        """Users of each arm so far."""
        return {arm: self._moments["" if self.paired else arm].count for arm in self.arms} if self._moments else {}

    def results(self, always_valid: float | None = None) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
        """{"ab_test": {arm: {metric: {"mean", "diff_pct", "ci95"}}}}, plain floats that JSON takes.

        `diff_pct` is 100 (mean / control's mean − 1) and `ci95` its interval [low, high]; the control has 0 and
        [0, 0]. Where the control's mean is 0 there is no such difference: None and [None, None]. Metrics are those
        whose sums were given.

        Args:
          always_valid: half-width in standard errors (`sequential`) of a second interval, `always_valid95`; coverage
            and Gini, which are no means over users, have none.

        Raises:
          ValueError: if an arm has fewer than two users, or no user has any of a metric's denominator.
        """
        result = self.ratios(always_valid)
        if self._exposures:
            if set(self._exposures) != set(self.arms):
                raise ValueError(f"exposures are of the arms {sorted(self._exposures)}, expected {sorted(self.arms)}")
            found, quantile = catalogue.compare(self._exposures, self.control, self.paired)
            for metric, values in found.items():
                base = values[self.control][0]
                for arm, (value, error) in values.items():
                    result[arm][metric] = _entry(value, base, error, {"ci95": quantile}, arm == self.control)
        return {"ab_test": result}

    def ratios(self, always_valid: float | None = None) -> dict[str, dict[str, dict[str, Any]]]:
        """`results` without coverage and Gini, {arm: {metric: entry}}: the same in a fraction of the time."""
        quantiles = {"ci95": Z95} | ({} if always_valid is None else {"always_valid95": always_valid})
        means, covariance = self._mean_and_covariance()
        result: dict[str, dict[str, dict[str, Any]]] = {arm: {} for arm in self.arms}
        for metric, (numerator, denominator) in RATIOS.items():
            if numerator not in self._columns or denominator not in self._columns:
                continue
            values, gradients = self._ratio(metric, means)
            for arm in self.arms:
                base, base_gradient = values[self.control], gradients[self.control]
                if base:
                    gradient = gradients[arm] / base - values[arm] / base**2 * base_gradient
                    error = np.sqrt(max(float(gradient @ covariance @ gradient), 0.0))
                else:
                    error = 0.0
                result[arm][metric] = _entry(values[arm], base, error, quantiles, arm == self.control)
        return result

    def _mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Means [A M] of all arms' columns and the covariance [A M, A M] of these means."""
        for name, part in self._moments.items():
            if part.count < 2:
                raise ValueError(f"arm {name or self.control!r} has {part.count} users, intervals need at least 2")
        if not self._moments:
            raise ValueError("no users yet: call update before results")
        if self.paired:
            both = self._moments[""]
            return both.mean, both.covariance() / both.count
        parts = [self._moments[arm] for arm in self.arms]
        size = len(self._columns)
        covariance = np.zeros((len(parts) * size,) * 2)
        for index, part in enumerate(parts):
            block = slice(index * size, (index + 1) * size)
            covariance[block, block] = part.covariance() / part.count
        return np.concatenate([part.mean for part in parts]), covariance

    def _ratio(self, metric: str, means: np.ndarray) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """A metric's value in every arm and its gradient [A M] with respect to the means."""
        values, gradients, size = {}, {}, len(self._columns)
        top, bottom = (self._columns.index(key) for key in RATIOS[metric])
        for index, arm in enumerate(self.arms):
            mean = means[index * size : (index + 1) * size]
            if not mean[bottom]:
                raise ValueError(f"arm {arm!r} has no {RATIOS[metric][1]}, so no {metric}: let it serve more sessions")
            values[arm] = float(mean[top] / mean[bottom])
            gradient = np.zeros((len(self.arms), size))
            gradient[index, top] += 1.0 / mean[bottom]
            gradient[index, bottom] -= values[arm] / mean[bottom]
            gradients[arm] = gradient.reshape(-1)
        if any(key.startswith(_COVARIATE) for key in self._columns):
            self._adjust(values, gradients, means)
        return values, gradients

    def _adjust(self, values: dict[str, float], gradients: dict[str, np.ndarray], means: np.ndarray) -> None:
        """CUPED (Deng et al., WSDM 2013) on the linearised metric, in place: mean − θ (x̄ of the arm − x̄ of all).

        θ [P] is one for all arms, the pooled within-arm regression of the metric on the covariates.
        """
        size = len(self._columns)
        columns = [i for i, key in enumerate(self._columns) if key.startswith(_COVARIATE)]
        counts = np.array([self._moments[arm].count for arm in self.arms], np.float64)
        share = counts / counts.sum()
        explained, spread = np.zeros(len(columns)), np.zeros((len(columns),) * 2)
        for index, arm in enumerate(self.arms):
            products = self._moments[arm].products
            explained += gradients[arm].reshape(-1, size)[index] @ products[:, columns]
            spread += products[np.ix_(columns, columns)]
        scale = np.sqrt(spread.diagonal())  # likes and seconds differ by many powers of ten
        scale = np.where(scale > 0, scale, 1.0)
        theta = np.linalg.lstsq(spread / np.outer(scale, scale), explained / scale, rcond=1e-9)[0] / scale
        x = means.reshape(-1, size)[:, columns]  # [A, P]
        for index, arm in enumerate(self.arms):
            weight = share - (np.arange(len(self.arms)) == index)  # x̄ of all − x̄ of the arm
            values[arm] += float(weight @ x @ theta)
            gradients[arm].reshape(-1, size)[:, columns] += np.outer(weight, theta)


def compare(
    arms: Mapping[str, Mapping[str, np.ndarray]],
    control: str,
    paired: bool,
    covariate: Mapping[str, np.ndarray] | None = None,
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """{"ab_test": {arm: {metric: {"mean", "diff_pct", "ci95"}}}} of arms held in memory; see `ABTest` for everything.

    Example:
      compare({"production": {"watch_time": seconds, "depth": videos}, "mmrf": {…}}, "production", paired=True)
    """
    test = ABTest(tuple(arms), control, paired)
    test.update(arms, covariate)
    return test.results()


def format_table(results: Mapping[str, Any], metrics: Sequence[str] | None = None, width: int = 160) -> str:
    """Arms × metrics as aligned text that is a Markdown table too; a cell is "mean, diff % [low, high]".

    Args:
      results: what `compare` gives, or its "ab_test" entry.
      metrics: columns, in this order; all of the first arm if left out.
      width: characters of a line; further metrics go into further tables below.

    Raises:
      KeyError: for a metric that an arm does not have.
    """
    results = results.get("ab_test", results)
    metrics = list(next(iter(results.values()))) if metrics is None else list(metrics)
    names = ["arm", *results]
    names = [name.ljust(max(map(len, names))) for name in names]
    tables: list[list[str]] = []
    for metric in metrics:
        missing = [arm for arm in results if metric not in results[arm]]
        if missing:
            raise KeyError(
                f"metric {metric!r} is not among the results of {missing}; choose among {list(results[missing[0]])}"
            )
        cells = [metric, *(cell(results[arm][metric]) for arm in results)]
        size = max(map(len, cells))
        if not tables or len(tables[-1][0]) + size + 3 > width:
            tables.append([f"| {name} |" for name in names])
        tables[-1] = [f"{line} {cell.ljust(size)} |" for line, cell in zip(tables[-1], cells, strict=True)]
    for table in tables:
        table.insert(1, "".join("|" if char == "|" else "-" for char in table[0]))
    return "\n\n".join("\n".join(table) for table in tables)


def _table(
    arm: str, sums: Mapping[str, np.ndarray], covariate: np.ndarray | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Column names and [n, M] float64 of an arm, checked."""
    given = [key for key in sums if key not in ("user_id", "exposures")]
    unknown = [key for key in given if key not in SUMS]
    if unknown or not given:
        raise ValueError(f"arm {arm!r} has sums {given}; choose among {', '.join(SUMS)}")
    columns = {key: np.asarray(sums[key], np.float64) for key in SUMS if key in given}
    columns.setdefault("sessions", np.ones_like(columns[given[0]]))
    if covariate is not None:
        covariate = np.asarray(covariate, np.float64)
        for i, values in enumerate(covariate.T if covariate.ndim == 2 else [covariate]):
            columns[f"{_COVARIATE} {i}"] = values
    for key, values in columns.items():
        if values.ndim != 1 or values.shape != columns[given[0]].shape:
            raise ValueError(
                f"{key} of arm {arm!r} has shape {values.shape}, {given[0]} {columns[given[0]].shape}: want [n]"
            )
        if not np.isfinite(values).all():
            raise ValueError(
                f"{key} of arm {arm!r} has {int((~np.isfinite(values)).sum())} numbers that are not finite"
            )
    return tuple(columns), np.stack(list(columns.values()), axis=1)


def _entry(value: float, base: float, error: float, quantiles: Mapping[str, float], is_control: bool) -> dict[str, Any]:
    """`error` is the standard error of value / base; `quantiles` are of the intervals by name."""
    if is_control:
        return {"mean": value, "diff_pct": 0.0} | {name: [0.0, 0.0] for name in quantiles}
    if not base:
        return {"mean": value, "diff_pct": None} | {name: [None, None] for name in quantiles}
    diff = 100.0 * (value / base - 1.0)
    half = {name: 100.0 * quantile * float(error) for name, quantile in quantiles.items()}
    return {"mean": value, "diff_pct": diff} | {name: [diff - x, diff + x] for name, x in half.items()}


def cell(entry: Mapping[str, Any]) -> str:
    """A metric of an arm as "mean, diff % [low, high]"."""
    mean = f"{entry['mean']:.4g}" if abs(entry["mean"]) < 1000 else f"{entry['mean']:,.0f}"
    if entry["diff_pct"] is None:
        return f"{mean}, n/a"
    low, high = entry["ci95"]
    return f"{mean}, {entry['diff_pct']:+.2f} % [{low:+.2f}, {high:+.2f}]"
