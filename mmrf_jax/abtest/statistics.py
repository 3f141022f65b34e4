"""Statistics of an A/B test: differences to the control in % with 95 % intervals.

Every metric is a ratio of two sums over users, such as watch time by sessions or likes by exposed videos. Its error
comes from the delta method with users as the independent units (Deng, Knoblich and Lu, "Applying the Delta Method in
Metric Analytics", KDD 2018). The interval is symmetric in the logarithm of the ratio to the control, as Katz's is for
risk ratios: it never goes below −100 %, and for many events it matches the interval around the difference. If fewer
than `MIN_EVENTS` users of either arm have any of a metric, a note replaces the difference and the interval.
Only means and covariances of per-user sums are needed: `ABTest` collects them block by block.
`metrics.coverage` has coverage and Gini, `assignment` the assignment to arms and its check, `sequential` the
always-valid intervals.

Letters: n users of an arm, A arms, M columns of per-user sums, P covariates, G groups of users, V videos.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from mmrf_jax.abtest import moments
from mmrf_jax.estimate import MIN_EVENTS
from mmrf_jax.metrics import coverage
from mmrf_jax.signals import SHORT_VIDEO, Signals

#: Metrics for which lower is better, whatever the signals.
LOWER_IS_BETTER = ("truncated", "gini")
MAX_ERROR = 0.5  # relative standard error of a ratio; above it few users hold most events: no interval is reliable
_COVARIATE = "covariate"
Z95 = float(special.ndtri(0.975))  # half-width of an interval in standard errors


def ratios_of(signals: Signals) -> dict[str, tuple[str, str]]:
    """Return metric -> (numerator, denominator), keys of per-user sums; rates of binary signals are per exposed video.

    `visits` and `NAME_per_day` are over all users of an arm, including those without a visit; `user_days` is days under
    test, users × days overall.
    """
    return {
        **{name: (name, "sessions") for name in signals.numeric_names},  # such as seconds per session
        "depth": ("depth", "sessions"),  # videos per session
        "requests": ("requests", "sessions"),  # requests per session
        **{name: (name, "depth") for name in signals.binary_names},
        "return_rate": ("returned", "sessions"),  # share of sessions followed by another within a day
        "ild": ("ild", "requests"),  # intra-list diversity per slate
        "visits": ("sessions", "user_days"),  # sessions per user and day
        f"{signals.main}_per_day": (signals.main, "user_days"),  # such as seconds per user and day
    }


def sums_of(signals: Signals) -> tuple[str, ...]:
    """Return the per-user sums that an arm may have; `sessions` defaults to 1 for every user."""
    counts = ("depth", "requests", "returned", "ild", *signals.binary_names, "user_days")
    return ("sessions", *signals.numeric_names, *counts)


def signals_of(results: Mapping[str, Any]) -> Signals:
    """Return the signals of a result; tables of studies, which are of the world, do not name them."""
    return Signals.from_dict(results["signals"]) if "signals" in results else SHORT_VIDEO


def main_metric(results: Mapping[str, Any]) -> str:
    """Return the metric of the main agent's signal; if it was not measured, the first metric."""
    main = signals_of(results).main
    metrics: Mapping[str, Any] = next(iter(results.get("ab_test", results).values()), {})
    return main if main in metrics else next(iter(metrics), main)


def lower_is_better(results: Mapping[str, Any] | Signals) -> frozenset[str]:
    """Return the metrics for which lower is better, given signals or a result."""
    signals = results if isinstance(results, Signals) else signals_of(results)
    return frozenset((*LOWER_IS_BETTER, *(signal.name for signal in signals.signals if signal.sign < 0)))


class ABTest:
    """Collects per-user sums of all arms, block by block, and compares the arms with the control.

    Memory is (A M)², independent of the number of users. Results do not depend on the order of users or the split into
    blocks, up to float64 rounding.

    Args:
      signals: of the sums.
      arms: names, including the control.
      control: name of the arm that the others are compared with.
      paired: True if the arms hold the same users in the same order (a simulator can serve every arm to every user);
        their covariance then narrows the intervals. False if each user is in one arm.

    Raises:
      ValueError: for a control that is not an arm, or duplicate names.
    """

    def __init__(self, signals: Signals, arms: Sequence[str], control: str, paired: bool):
        self._ratios, self._sums = ratios_of(signals), sums_of(signals)
        self.arms, self.control, self.paired = tuple(arms), control, paired
        if control not in self.arms or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"control {control!r} must be one of the arms {self.arms}, all different")
        self._columns: tuple[str, ...] = ()
        self._moments: dict[str, moments.Moments] = {}  # by arm, or under "" for the columns of all arms concatenated
        self._with_any: dict[str, np.ndarray] = {}  # arm -> [M] number of users with a nonzero sum
        self._exposures: dict[str, np.ndarray] = {}

    def update(
        self, sums: Mapping[str, Mapping[str, np.ndarray]], covariate: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Add users.

        Args:
          sums: arm -> key of `sums_of` -> [n] sums over the user's sessions; optionally `user_id` [n], which must agree
            between paired arms; optionally `exposures` [G, V], counts by group of users (`rollout.exposure_group`) and
            video.
          covariate: arm -> [n] or [n, P], known before the test and correlated with the metrics, such as the watch time
            of the history; CUPED removes the variance that they explain.

        Raises:
          ValueError: for missing arms, unknown or differing keys, inconsistent shapes, or numbers that are not finite.
        """
        if set(sums) != set(self.arms):
            raise ValueError(f"sums are of the arms {sorted(sums)}, expected {sorted(self.arms)}")
        if covariate is not None and self.paired:
            raise ValueError("paired arms have the same users, so a covariate has nothing to adjust; leave it out")
        if covariate is not None and set(covariate) != set(self.arms):
            raise ValueError(f"covariate is of the arms {sorted(covariate)}, expected {sorted(self.arms)}")
        tables = {}
        for arm in self.arms:
            columns, tables[arm] = _table(self._sums, arm, sums[arm], None if covariate is None else covariate[arm])
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
        for arm, table in tables.items():
            self._with_any[arm] = self._with_any.get(arm, 0) + np.count_nonzero(table, axis=0)
        if self.paired:
            tables = {"": np.concatenate([tables[arm] for arm in self.arms], axis=1)}
        for name, table in tables.items():
            self._moments.setdefault(name, moments.Moments(table.shape[1])).update(table)
        for arm in self.arms:
            if "exposures" in sums[arm]:
                counts = np.asarray(sums[arm]["exposures"], np.int64)
                self._exposures[arm] = self._exposures.get(arm, 0) + counts

    def users(self) -> dict[str, int]:
        """Return the number of users in each arm so far."""
        return {arm: self._moments["" if self.paired else arm].count for arm in self.arms} if self._moments else {}

    def results(self, always_valid: float | None = None) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
        """Return {"ab_test": {arm: {metric: {"mean", "diff_pct", "ci95"}}}} as plain floats, ready for JSON.

        `diff_pct` is 100 (mean / control's mean − 1) and `ci95` its interval [low, high]; the control has 0 and
        [0, 0]. If there are too few events, both are None and `note` gives the reason: a word or two, a colon and the
        numbers. `mean` is None if an arm's denominator is zero. Metrics are those whose sums were given.

        Args:
          always_valid: half-width in standard errors (`sequential`) of a second interval, `always_valid95`; coverage
            and Gini, which are not means over users, have none.

        Raises:
          ValueError: if an arm has fewer than two users.
        """
        result = self.ratios(always_valid)
        if self._exposures:
            if set(self._exposures) != set(self.arms):
                raise ValueError(f"exposures are of the arms {sorted(self._exposures)}, expected {sorted(self.arms)}")
            found, quantile = coverage.compare_coverage(self._exposures, self.control, self.paired)
            for metric, values in found.items():
                base, users = values[self.control][0], self.users()
                for arm, (value, error) in values.items():
                    result[arm][metric] = self._entry(arm, value, base, error, {"ci95": quantile}, users)
        return {"ab_test": result}

    def ratios(self, always_valid: float | None = None) -> dict[str, dict[str, dict[str, Any]]]:
        """Return `results` without coverage and Gini, {arm: {metric: entry}}, in a fraction of the time."""
        quantiles = {"ci95": Z95} | ({} if always_valid is None else {"always_valid95": always_valid})
        means, covariance = self._mean_and_covariance()
        result: dict[str, dict[str, dict[str, Any]]] = {arm: {} for arm in self.arms}
        for metric, (numerator, denominator) in self._ratios.items():
            if numerator not in self._columns or denominator not in self._columns:
                continue
            values, gradients = self._ratio(metric, means)
            for arm in self.arms:
                base, base_gradient, error = values[self.control], gradients[self.control], 0.0
                if base:
                    gradient = gradients[arm] / base - values[arm] / base**2 * base_gradient
                    error = np.sqrt(max(float(gradient @ covariance @ gradient), 0.0))
                column = self._columns.index(numerator)
                events = {name: int(self._with_any[name][column]) for name in (self.control, arm)}
                result[arm][metric] = self._entry(arm, values[arm], base, error, quantiles, events)
        return result

    def _entry(
        self,
        arm: str,
        value: float,
        base: float,
        error: float,
        quantiles: Mapping[str, float],
        events: Mapping[str, int],
    ) -> dict[str, Any]:
        """Return the entry of a metric of an arm; see `results`.

        Args:
          value: the arm's metric, NaN if undefined.
          base: the control's metric, NaN if undefined.
          error: standard error of value / base.
          quantiles: half-widths of the intervals in standard errors, by name.
          events: by arm, number of users with any of the metric.
        """
        mean = None if math.isnan(value) else value
        note = too_few({name: events[name] for name in (self.control, arm)})
        if mean is None:
            note = "none: the arm has nothing to divide by"
        elif arm == self.control:
            return {"mean": mean, "diff_pct": 0.0} | {name: [0.0, 0.0] for name in quantiles}
        elif not note and not (value > 0.0 and base > 0.0):
            note = f"none: {value:.4g} and {base:.4g} of {self.control} have no ratio"
        elif not note and error * base > MAX_ERROR * value:
            note = f"too wide: the ratio to {self.control} has an error of {100.0 * error * base / value:.0f} % of it"
        if note:
            return {"mean": mean, "diff_pct": None, **dict.fromkeys(quantiles), "note": note}
        ratio = value / base
        spread = {name: math.exp(quantile * float(error) / ratio) for name, quantile in quantiles.items()}
        entry: dict[str, Any] = {"mean": mean, "diff_pct": 100.0 * (ratio - 1.0)}
        return entry | {name: [100.0 * (ratio / x - 1.0), 100.0 * (ratio * x - 1.0)] for name, x in spread.items()}

    def _mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the means [A M] of all arms' columns and the covariance [A M, A M] of these means."""
        for name, part in self._moments.items():
            if part.count < 2:
                raise ValueError(
                    f"arm {name or self.control!r} has {part.count} users, intervals need at least 2; use more sessions"
                )
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
        """Return a metric's value in every arm (NaN without a denominator) and its gradient [A M] in the means."""
        values, gradients, size = {}, {}, len(self._columns)
        top, bottom = (self._columns.index(key) for key in self._ratios[metric])
        for index, arm in enumerate(self.arms):
            mean = means[index * size : (index + 1) * size]
            gradient = np.zeros((len(self.arms), size))
            values[arm] = math.nan
            if mean[bottom]:
                values[arm] = float(mean[top] / mean[bottom])
                gradient[index, top] += 1.0 / mean[bottom]
                gradient[index, bottom] -= values[arm] / mean[bottom]
            gradients[arm] = gradient.reshape(-1)
        if any(key.startswith(_COVARIATE) for key in self._columns) and not np.isnan(list(values.values())).any():
            self._adjust(values, gradients, means)
        return values, gradients

    def _adjust(self, values: dict[str, float], gradients: dict[str, np.ndarray], means: np.ndarray) -> None:
        """Apply CUPED (Deng et al., WSDM 2013) in place to the linearised metric: mean − θ (x̄ of the arm − x̄ of all).

        θ [P], shared by all arms, is the pooled within-arm regression of the metric on the covariates.
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
        scale = np.sqrt(spread.diagonal())  # scales differ by many powers of ten (likes, seconds)
        scale = np.where(scale > 0, scale, 1.0)
        theta = np.linalg.lstsq(spread / np.outer(scale, scale), explained / scale, rcond=1e-9)[0] / scale
        x = means.reshape(-1, size)[:, columns]  # [A, P]
        for index, arm in enumerate(self.arms):
            weight = share - (np.arange(len(self.arms)) == index)  # x̄ of all − x̄ of the arm
            values[arm] += float(weight @ x @ theta)
            gradients[arm].reshape(-1, size)[:, columns] += np.outer(weight, theta)


def format_ab_test(results: Mapping[str, Any], metrics: Sequence[str] | None = None, width: int = 160) -> str:
    """Format arms × metrics as aligned text that is also a Markdown table; `cell` formats each cell.

    Args:
      results: of an A/B test, or its "ab_test" entry.
      metrics: columns, in this order; all metrics of the first arm by default.
      width: maximum line length; the remaining metrics go into further tables below.

    Raises:
      KeyError: for a metric that an arm does not have.
    """
    less, results = lower_is_better(results), results.get("ab_test", results)
    control = control_of(results)
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
        cells = [metric, *(cell(results[arm][metric], metric in less, arm == control) for arm in results)]
        size = max(map(len, cells))
        if not tables or len(tables[-1][0]) + size + 3 > width:
            tables.append([f"| {name} |" for name in names])
        tables[-1] = [f"{line} {cell.ljust(size)} |" for line, cell in zip(tables[-1], cells, strict=True)]
    for table in tables:
        table.insert(1, "".join("|" if char == "|" else "-" for char in table[0]))
    return "\n\n".join("\n".join(table) for table in tables)


def _table(
    known: Sequence[str], arm: str, sums: Mapping[str, np.ndarray], covariate: np.ndarray | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Check the sums of an arm; return the column names and [n, M] float64."""
    given = [key for key in sums if key not in ("user_id", "exposures")]
    unknown = [key for key in given if key not in known]
    if unknown or not given:
        raise ValueError(f"arm {arm!r} has sums {given}; choose among {', '.join(known)}")
    columns = {key: np.asarray(sums[key], np.float64) for key in known if key in given}
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


def verdict(bounds: Sequence[float | None] | None, less: bool = False) -> str:
    """Return "better" or "worse" for the interval of a difference, or "" if it contains 0 or is missing.

    Args:
      less: whether less is better.
    """
    if bounds is None or None in bounds:
        return ""
    low, high = bounds
    if low <= 0.0 <= high:  # type: ignore[operator]
        return ""
    return "better" if (low > 0.0) != less else "worse"  # type: ignore[operator]


def too_few(events: Mapping[str, int]) -> str:
    """Return why there is no interval, given the users of each arm with any of a metric; "" if there are enough."""
    scarce = min(events, key=lambda arm: events[arm])
    if events[scarce] >= MIN_EVENTS:
        return ""
    return f"too few: {events[scarce]} users of {scarce} have any, an interval needs {MIN_EVENTS}"


def reason(entry: Mapping[str, Any]) -> str:
    """Return why an entry has no interval, in a word or two."""
    return entry.get("note", "n/a").partition(":")[0]


def control_of(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the control: the first arm all of whose known intervals are [0, 0]; "" if there is none."""
    for arm, metrics in arms.items():
        known = [entry["ci95"] for entry in metrics.values() if entry.get("ci95") is not None]
        if known and all(bounds == [0, 0] for bounds in known):
            return arm
    return ""


def too_small(results: Mapping[str, Any], metric: str = "") -> str:
    """Return a sentence on the arms whose difference to the control is not significant; "" if all differences are.

    Args:
      results: of an A/B test, or its "ab_test" entry.
      metric: by which to compare; empty for `main_metric`.
    """
    arms, metric = results.get("ab_test", results), metric or main_metric(results)
    control = control_of(arms)
    found = {arm: metrics[metric]["ci95"] for arm, metrics in arms.items() if arm != control and metric in metrics}
    unsure = {arm: bounds for arm, bounds in found.items() if not verdict(bounds) and bounds != [0, 0]}
    if not unsure:
        return ""
    text = f"Too small to tell {', '.join(unsure)} from {control or 'the control'} by {metric}: "
    known = [max(abs(x) for x in bounds) for bounds in unsure.values() if bounds and None not in bounds]
    if len(known) < len(unsure):
        return f"{text}there are too few users for an interval; use more sessions."
    return f"{text}the true difference may be 0, and as large as {max(known):.2g} %; use more sessions."


def cell(entry: Mapping[str, Any], less: bool = False, control: bool = False) -> str:
    """Format a metric of an arm as "mean, diff % [low, high]", with "better" or "worse" if the interval excludes 0.

    Args:
      entry: of `ABTest.results`.
      less: whether less is better.
      control: whether it is of the control, which has no difference to itself.
    """
    mean = "–" if entry["mean"] is None else f"{entry['mean']:.4g}"
    if entry["mean"] is not None and abs(entry["mean"]) >= 1000:
        mean = f"{entry['mean']:,.0f}"
    if control:
        return mean
    if entry["diff_pct"] is None:
        return f"{mean}, {reason(entry)}"
    low, high = entry["ci95"]
    said = verdict(entry["ci95"], less)
    return f"{mean}, {entry['diff_pct']:+.2f} % [{low:+.2f}, {high:+.2f}]" + (f" {said}" if said else "")
