"""Statistics of an A/B test: differences to the control in % with 95 % intervals.

Every metric is a ratio of two sums over users — watch time by sessions, likes by exposed videos — so its interval is
the delta method's, users being the independent units (Deng, Knoblich and Lu, "Applying the Delta Method in Metric
Analytics", KDD 2018). Only means and covariances of per-user sums are needed: `ABTest` collects them block by block,
`compare` does it in one call. Coverage and Gini are functions of a whole catalogue's exposures; their intervals are
a jackknife over groups of users, which errs on the wide side (coverage's by about a factor 2 in A/A tests of a
thousand videos). Assignment to arms is by hash, checked by `sample_ratio_mismatch`.

Letters: n users of an arm, A arms, M columns of per-user sums, G groups of users, V videos of the catalogue.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from mmrf_jax.evaluation import diversity
from mmrf_jax.types import BINARY_SIGNALS

#: Metric -> (numerator, denominator), keys of per-user sums. Interaction rates are per exposed video.
RATIOS = {
    "watch_time": ("watch_time", "sessions"),  # seconds a session
    "depth": ("depth", "sessions"),  # videos a session
    "requests": ("requests", "sessions"),  # requests a session
    **{signal: (signal, "depth") for signal in BINARY_SIGNALS},
    "return_rate": ("returned", "sessions"),  # sessions followed by another within a day
    "ild": ("ild", "requests"),  # intra-list diversity of a slate
}
#: Per-user sums an arm may have; `sessions` is 1 for every user if left out.
SUMS = ("sessions", "watch_time", "depth", "requests", "returned", "ild", *BINARY_SIGNALS)
#: Metrics of the arm's exposures of the catalogue, [G, V] under the key `exposures`.
CATALOGUE: dict[str, Callable[[np.ndarray], np.ndarray]] = {"coverage": diversity.coverage, "gini": diversity.gini}
EXPOSURE_GROUPS = 20
_COVARIATE = "covariate"
_BLOCK_ROWS = 1 << 15
_Z95 = float(special.ndtri(0.975))


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
        self._moments: dict[str, _Moments] = {}  # by arm, or under "" for the columns of all arms side by side
        self._exposures: dict[str, np.ndarray] = {}

    def update(
        self, sums: Mapping[str, Mapping[str, np.ndarray]], covariate: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Adds users.

        Args:
          sums: arm -> key of `SUMS` -> [n] sums over the user's sessions; optionally `user_id` [n], checked to agree
            when paired; optionally `exposures` [G, V], counts by group of users (`exposure_group`) and video.
          covariate: arm -> [n], something known before the test that goes with the metrics, such as the watch time of
            the history; CUPED then takes out what it explains.

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
            self._moments.setdefault(name, _Moments(table.shape[1])).update(table)
        for arm in self.arms:
            if "exposures" in sums[arm]:
                counts = np.asarray(sums[arm]["exposures"], np.int64)
                self._exposures[arm] = self._exposures.get(arm, 0) + counts

    def results(self) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
        """{"ab_test": {arm: {metric: {"mean", "diff_pct", "ci95"}}}}, plain floats that JSON takes.

        `diff_pct` is 100 (mean / control's mean − 1) and `ci95` its interval [low, high]; the control has 0 and
        [0, 0]. Where the control's mean is 0 there is no such difference: None and [None, None]. Metrics are those
        whose sums were given.

        Raises:
          ValueError: if an arm has fewer than two users, or no user has any of a metric's denominator.
        """
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
                result[arm][metric] = _entry(values[arm], base, error, _Z95, arm == self.control)
        if self._exposures:
            self._add_catalogue(result)
        return {"ab_test": result}

    def _mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Means [A M] of all arms' columns and the covariance [A M, A M] of these means."""
        for name, moments in self._moments.items():
            if moments.count < 2:
                raise ValueError(f"arm {name or self.control!r} has {moments.count} users, intervals need at least 2")
        if not self._moments:
            raise ValueError("no users yet: call update before results")
        if self.paired:
            moments = self._moments[""]
            return moments.mean, moments.covariance() / moments.count
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
        if _COVARIATE in self._columns:
            self._adjust(values, gradients, means)
        return values, gradients

    def _adjust(self, values: dict[str, float], gradients: dict[str, np.ndarray], means: np.ndarray) -> None:
        """CUPED (Deng et al., WSDM 2013) on the linearised metric, in place: mean − θ (x̄ of the arm − x̄ of all).

        θ is one for all arms, the pooled within-arm regression of the metric on the covariate.
        """
        size, column = len(self._columns), self._columns.index(_COVARIATE)
        counts = np.array([self._moments[arm].count for arm in self.arms], np.float64)
        share = counts / counts.sum()
        explained, spread = 0.0, 0.0
        for index, arm in enumerate(self.arms):
            covariance = self._moments[arm].covariance()
            own = gradients[arm].reshape(-1, size)[index]
            explained += counts[index] * float(own @ covariance[:, column])
            spread += counts[index] * float(covariance[column, column])
        theta = explained / spread if spread else 0.0
        x = means.reshape(-1, size)[:, column]
        for index, arm in enumerate(self.arms):
            weight = share - (np.arange(len(self.arms)) == index)  # x̄ of all − x̄ of the arm
            values[arm] += theta * float(weight @ x)
            gradients[arm].reshape(-1, size)[:, column] += theta * weight

    def _add_catalogue(self, result: dict[str, dict[str, dict[str, Any]]]) -> None:
        shapes = {arm: counts.shape for arm, counts in self._exposures.items()}
        shape = next(iter(shapes.values()))
        if set(shapes) != set(self.arms) or len(set(shapes.values())) > 1 or len(shape) != 2 or shape[0] < 2:
            raise ValueError(f"exposures need one shape [groups >= 2, videos] in every arm, got {shapes}")
        quantile = float(special.stdtrit(shape[0] - 1, 0.975))
        for metric, function in CATALOGUE.items():
            value, without = {}, {}
            for arm, counts in self._exposures.items():
                total = counts.sum(axis=0)
                value[arm] = float(function(total))
                without[arm] = np.array([function(total - group) for group in counts])  # [G]
            base = value[self.control]
            for arm in self.arms:
                error = 0.0
                if base and self.paired:
                    error = _jackknife_error(
                        without[arm] / np.where(without[self.control], without[self.control], base)
                    )
                elif base:
                    own, other = _jackknife_error(without[arm]), _jackknife_error(without[self.control])
                    error = float(np.hypot(own / base, other * value[arm] / base**2))
                result[arm][metric] = _entry(value[arm], base, error, quantile, arm == self.control)


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


def assign(user_ids: np.ndarray, shares: Sequence[float], salt: str) -> np.ndarray:
    """Arm of each user by hash: the same for a user in any batch, order, process and machine.

    Args:
      user_ids: [n] integers.
      shares: one per arm, adding up to 1.
      salt: name of the experiment; assignments under different salts are independent.

    Returns:
      [n] int32 in [0, len(shares)).

    Raises:
      ValueError: for ids that are no integers or shares that do not add up to 1.
    """
    user_ids = np.asarray(user_ids)
    share = np.asarray(shares, np.float64)
    if not np.issubdtype(user_ids.dtype, np.integer):
        raise ValueError(f"user_ids must be integers, got {user_ids.dtype}")
    if share.ndim != 1 or not len(share) or (share < 0).any() or abs(share.sum() - 1.0) > 1e-9:
        raise ValueError(f"shares must be >= 0 and add up to 1, got {share.tolist()} (sum {share.sum():.6g})")
    key = np.frombuffer(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "<u8")[0]
    uniform = (_splitmix64(_splitmix64(user_ids.astype(np.uint64)) ^ key) >> np.uint64(11)) * 2.0**-53
    # The first arm whose cumulated share is above the number; the last edge is open so that rounding loses nobody.
    return np.searchsorted(np.cumsum(share)[:-1], uniform, side="right").astype(np.int32)


def exposure_group(user_ids: np.ndarray, groups: int = EXPOSURE_GROUPS) -> np.ndarray:
    """[n] int32 in [0, groups): the group of users whose exposures are counted together for the jackknife."""
    return assign(user_ids, [1.0 / groups] * groups, "exposure_group")


def sample_ratio_mismatch(counts: Sequence[int], expected_shares: Sequence[float]) -> float:
    """p-value of Pearson's chi-square test that users fell into the arms as intended.

    A p-value below 0.001 means that the assignment or the logging is broken, and no metric is to be trusted
    (Fabijan et al., "Diagnosing Sample Ratio Mismatch in Online Controlled Experiments", KDD 2019).

    Args:
      counts: users of each arm.
      expected_shares: the shares they were assigned by, each above 0; scaled to add up to 1.

    Raises:
      ValueError: for lengths that differ or are below 2, no users, negative counts, or a share that is not above 0.
    """
    observed, shares = np.asarray(counts, np.float64), np.asarray(expected_shares, np.float64)
    if observed.ndim != 1 or observed.shape != shares.shape or len(observed) < 2:
        raise ValueError(
            f"counts {observed.shape} and expected_shares {shares.shape} need one number for each arm, >= 2"
        )
    if observed.sum() <= 0 or (observed < 0).any() or (shares <= 0).any():
        raise ValueError(f"counts {observed.tolist()} must be >= 0, some > 0, and shares {shares.tolist()} all > 0")
    expected = observed.sum() * shares / shares.sum()
    return float(special.chdtrc(len(observed) - 1, ((observed - expected) ** 2 / expected).sum()))


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
        cells = [metric, *(_cell(results[arm][metric]) for arm in results)]
        size = max(map(len, cells))
        if not tables or len(tables[-1][0]) + size + 3 > width:
            tables.append([f"| {name} |" for name in names])
        tables[-1] = [f"{line} {cell.ljust(size)} |" for line, cell in zip(tables[-1], cells, strict=True)]
    for table in tables:
        table.insert(1, "".join("|" if char == "|" else "-" for char in table[0]))
    return "\n\n".join("\n".join(table) for table in tables)


class _Moments:
    """Count, mean [M] and sum of products of deviations [M, M] of rows (Chan, Golub and LeVeque's update)."""

    def __init__(self, size: int):
        self.count = 0
        self.mean = np.zeros(size)
        self.products = np.zeros((size, size))

    def update(self, rows: np.ndarray) -> None:
        for first in range(0, len(rows), _BLOCK_ROWS):
            block = rows[first : first + _BLOCK_ROWS]
            mean = block.mean(axis=0)
            centred, shift = block - mean, mean - self.mean
            total = self.count + len(block)
            self.products += centred.T @ centred + np.outer(shift, shift) * (self.count * len(block) / total)
            self.mean = self.mean + shift * (len(block) / total)
            self.count = total

    def covariance(self) -> np.ndarray:
        return self.products / (self.count - 1)


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
        columns[_COVARIATE] = np.asarray(covariate, np.float64)
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


def _entry(value: float, base: float, error: float, quantile: float, is_control: bool) -> dict[str, Any]:
    """`error` is the standard error of value / base."""
    if is_control:
        return {"mean": value, "diff_pct": 0.0, "ci95": [0.0, 0.0]}
    if not base:
        return {"mean": value, "diff_pct": None, "ci95": [None, None]}
    diff, half = 100.0 * (value / base - 1.0), 100.0 * quantile * float(error)
    return {"mean": value, "diff_pct": diff, "ci95": [diff - half, diff + half]}


def _jackknife_error(without: np.ndarray) -> float:
    """Standard error of a statistic from its values [G] with one group left out."""
    groups = len(without)
    return float(np.sqrt((groups - 1) / groups * ((without - without.mean()) ** 2).sum()))


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """The mixing step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), [n] uint64."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _cell(entry: Mapping[str, Any]) -> str:
    mean = f"{entry['mean']:.4g}" if abs(entry["mean"]) < 1000 else f"{entry['mean']:,.0f}"
    if entry["diff_pct"] is None:
        return f"{mean}, n/a"
    low, high = entry["ci95"]
    return f"{mean}, {entry['diff_pct']:+.2f} % [{low:+.2f}, {high:+.2f}]"
