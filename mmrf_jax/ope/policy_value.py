"""The value of a policy from a log of another policy, by the estimators of the literature, with bootstrap intervals.

Every estimator is a function of sums over independent units (users, sessions, slates or rows), which the bootstrap
draws with replacement. `estimators` has the sweeps over caps and signals that a run reports.

Letters: n rows, U units, D draws, M sums of an estimator, P positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mmrf_jax.estimate import MIN_EVENTS, Estimate, column, require, require_interval, unit_numbers
from mmrf_jax.ope import slates
from mmrf_jax.ope.estimators import resampled_sums

_LARGEST = np.exp(300.0)  # of a weight, so that its square is finite; such a log is uninformative anyway
_ROUNDING = 1e-6  # by which a probability may exceed 1


def estimate(
    reward: ArrayLike,
    *,
    pscore: ArrayLike,
    target_pscore: ArrayLike,
    group: Iterable[Hashable] | None = None,
    estimators: Sequence[str] = ("ips", "snips", "ncis", "dr"),
    cap: float = 10.0,
    tau: float = 10.0,
    shrinkage: float = 100.0,
    reward_model: tuple[ArrayLike, ArrayLike] | None = None,
    slate_id: Iterable[Hashable] | None = None,
    position: ArrayLike | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Estimate the mean reward of a target policy from a log of another policy.

    With the weight w = target_pscore / pscore of a row, its reward r, the reward model's q of the logged decision and
    its expectation v under the target policy, and means over rows:

    - `ips`: w r (Horvitz and Thompson, JASA 1952); `snips`: Σ w r / Σ w (Swaminathan and Joachims, NeurIPS 2015);
      `ncis`: the same with weights of at most `cap` (Gilotte et al., WSDM 2018).
    - `dm`: v; `dr`: v + min(w, cap) (r − q) (Dudík et al., ICML 2011); `sndr`: Σ v / n + Σ w (r − q) / Σ w (Kallus and
      Uehara, NeurIPS 2019).
    - `switch_dr`: v + w (r − q) where w ≤ `tau`, v elsewhere (Wang, Agarwal and Dudík, ICML 2017).
    - `dros`: v + λ w / (w² + λ) (r − q) with λ = `shrinkage`, DR with optimistic shrinkage (Su et al., ICML 2020).

    Of slates, where each row is a slot, estimate the mean over slates of the sum of their rewards:

    - `iips`: each slot with its own weight, for slots that do not influence each other (Li et al., KDD 2018). Its
      probabilities are marginal: of the item at this position.
    - `rips`: each slot with the product of the weights from the top down to it, for a user who goes from the top down
      (McInerney et al., KDD 2020). Its probabilities are conditional: of the item given those above, so that their
      running product is OBP's `pscore_cascade`.
    - `sips`: each slot with the product of all weights of its slate, whatever slots do to each other.
    - `cascade_dr`: `rips` with a reward model (Kiyohara et al., WSDM 2022). q is of the rewards from this slot to the
      slate's end, given the items down to this slot; v its expectation over the target policy's item for this slot.
    - `sniips`, `snrips`: weights divided by their mean at each position; `snsips`: by their mean over rows.

    Args:
      reward: [n] of the logged decisions.
      pscore: [n] probability of each decision under the policy that logged it, above 0.
      target_pscore: [n] its probability under the target policy.
      group: [n] ids of independent units, such as sessions, which the bootstrap draws; None for each slate, or without
        slates each row, alone.
      estimators: names, as above.
      cap: the largest weight of `ncis` and `dr`; inf for none.
      tau: the largest weight with which `switch_dr` corrects its model; 0 gives `dm`, inf the uncapped `dr`.
      shrinkage: λ of `dros`, which halves a weight of √λ; 0 gives `dm`, inf the uncapped `dr`.
      reward_model: (q, v), [n] each. None: the mean reward (for `cascade_dr`, that of the rest of a slate by position),
        which makes the estimator a control variate.
      slate_id: [n] ids of the slates; needed by their estimators. Give every slot of a slate.
      position: [n] numbers of the slots, ascending from the top; None if a slate's rows are in order.
      level: coverage of the percentile intervals.
      draws: bootstrap samples.
      seed: of the bootstrap.

    Returns:
      {name: Estimate}; `n` is the number of units, `ess` the effective sample size of the estimator's weights. What is
      undefined is NaN with the reason in `note`; so is the interval if fewer than 25 units have any reward, for
      estimators without a model of a weight above 0.

    Raises:
      ValueError: for an unknown estimator, shapes that disagree, probabilities that cannot be, or numbers that are not
        finite.

    Example:
      >>> found = estimate([1, 0, 1, 0], pscore=[0.5] * 4, target_pscore=[0.9, 0.1, 0.9, 0.1])
      >>> round(found["ips"].value, 3), round(found["snips"].value, 3)
      (0.9, 0.9)
    """
    require_interval(level, draws, seed)
    require("cap", cap, lambda x: x > 0, "above 0, inf for none")
    require("tau", tau, lambda x: x >= 0, "0 or more, inf for none")
    require("shrinkage", shrinkage, lambda x: x >= 0, "0 or more, inf for none")
    rewards = column("reward", reward).astype(np.float64)
    _check_names(estimators, slate_id, position)
    weight = _weights(pscore, target_pscore, len(rewards))
    slots = slates.alone(len(rewards)) if slate_id is None else slates.of_rows(slate_id, position, len(rewards))
    unit = _units(group, slots, len(rewards))
    log = _Log(rewards, weight, unit, slots, _model(reward_model, len(rewards)), cap, tau, shrinkage)
    if not len(rewards):
        return {name: Estimate(math.nan, note="no rows") for name in estimators}
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _estimates(log, {name: _ESTIMATORS[name](log) for name in estimators}, level, draws, seed)


@dataclasses.dataclass(frozen=True, eq=False)
class _Log:
    """The checked columns of a log, [n] each."""

    reward: np.ndarray
    weight: np.ndarray
    unit: np.ndarray  # int64, all of 0 … U − 1
    slots: slates.Slates
    given_model: tuple[np.ndarray, np.ndarray] | None
    cap: float
    tau: float
    shrinkage: float

    def sums(self, *columns: np.ndarray | float) -> np.ndarray:
        """Return the sums [U, M] of M columns over each unit's rows."""
        size = int(self.unit.max()) + 1
        full = (np.broadcast_to(np.asarray(x, np.float64), self.unit.shape) for x in columns)
        return np.stack([np.bincount(self.unit, x, size) for x in full], axis=1)

    def model(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the reward model's (q, v); by default the mean reward."""
        if self.given_model:
            return self.given_model
        mean = np.full(len(self.reward), self.reward.mean())
        return mean, mean

    def rest_model(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (q, v) of the rewards to a slate's end; by default their mean at each position."""
        if self.given_model:
            return self.given_model
        place = self.slots.place
        rest = np.bincount(place, self.slots.sum_to_end(self.reward)) / np.bincount(place)
        return rest[place], rest[place]


@dataclasses.dataclass(frozen=True, eq=False)
class _Statistic:
    """An estimator as a function of sums over units."""

    sums: np.ndarray  # [U, M]
    value: Callable[[np.ndarray], np.ndarray]  # sums [D, M] over all units -> [D]
    weight: np.ndarray | None  # [n]
    has_event: np.ndarray | None  # [n] bool; None where an estimator counts no events


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[:, 1] / sums[:, 0]


def _weighted(log: _Log, weight: np.ndarray) -> _Statistic:
    """Return Σ w r / n."""
    weighted = weight * log.reward
    return _Statistic(log.sums(1.0, weighted), _mean, weight, weighted != 0.0)


def _normalised(log: _Log, weight: np.ndarray) -> _Statistic:
    """Return Σ w r / Σ w."""
    weighted = weight * log.reward
    return _Statistic(log.sums(weight, weighted), _mean, weight, weighted != 0.0)


def _corrected(log: _Log, weight: np.ndarray) -> _Statistic:
    """Return Σ (v + w (r − q)) / n."""
    predicted, direct = log.model()
    rows = direct + weight * (log.reward - predicted)
    return _Statistic(log.sums(1.0, rows), _mean, weight, log.reward != 0.0)


def _direct(log: _Log) -> _Statistic:
    return _Statistic(log.sums(1.0, log.model()[1]), _mean, None, None)


def _normalised_dr(log: _Log) -> _Statistic:
    predicted, direct = log.model()
    sums = log.sums(1.0, direct, log.weight, log.weight * (log.reward - predicted))
    return _Statistic(sums, _sndr_value, log.weight, log.reward != 0.0)


def _sndr_value(sums: np.ndarray) -> np.ndarray:
    return sums[:, 1] / sums[:, 0] + sums[:, 3] / sums[:, 2]


def _switch(log: _Log) -> _Statistic:
    return _corrected(log, np.where(log.weight <= log.tau, log.weight, 0.0))


def _shrunk(log: _Log) -> _Statistic:
    if np.isinf(log.shrinkage):
        return _corrected(log, log.weight)
    # Of λ = 0 and a weight of 0 the limit is 0.
    bottom = log.weight**2 + log.shrinkage
    return _corrected(log, np.where(bottom > 0, log.shrinkage * log.weight / np.where(bottom > 0, bottom, 1.0), 0.0))


def _slate_weighted(log: _Log, weight: np.ndarray) -> _Statistic:
    """Return Σ w r / number of slates."""
    weighted = weight * log.reward
    return _Statistic(log.sums(log.slots.top, weighted), _mean, weight, weighted != 0.0)


def _slate_normalised(log: _Log, weight: np.ndarray) -> _Statistic:
    """Return Σ w r / mean of w over rows / number of slates."""
    weighted = weight * log.reward
    sums = log.sums(log.slots.top, 1.0, weight, weighted)
    return _Statistic(sums, _slate_normalised_value, weight, weighted != 0.0)


def _slate_normalised_value(sums: np.ndarray) -> np.ndarray:
    return sums[:, 3] / (sums[:, 2] / sums[:, 1]) / sums[:, 0]


def _position_normalised(log: _Log, weight: np.ndarray) -> _Statistic:
    """Return Σ over positions of Σ w r / mean of w at the position, over the number of slates."""
    positions, size = int(log.slots.place.max()) + 1, int(log.unit.max()) + 1
    cell, weighted = log.unit * positions + log.slots.place, weight * log.reward
    parts = [np.bincount(cell, x, size * positions) for x in (np.ones(len(cell)), weight, weighted)]
    sums = np.concatenate([log.sums(log.slots.top), *(x.reshape(size, positions) for x in parts)], axis=1)
    return _Statistic(sums, _position_normalised_value, weight, weighted != 0.0)


def _position_normalised_value(sums: np.ndarray) -> np.ndarray:
    count, weight, weighted = np.split(sums[:, 1:], 3, axis=1)
    there = np.where(count > 0, weighted / (weight / count), 0.0)  # a draw may have no row of a rare position
    return there.sum(axis=1) / sums[:, 0]


def _cascade_dr(log: _Log) -> _Statistic:
    predicted, direct = log.rest_model()
    weight = _running(log)
    above = np.where(log.slots.top, 1.0, weight[log.slots.above])
    rows = weight * (log.reward - predicted) + above * direct
    return _Statistic(log.sums(log.slots.top, rows), _mean, weight, log.reward != 0.0)


def _running(log: _Log) -> np.ndarray:
    return np.minimum(log.slots.running_product(log.weight), _LARGEST)


def _whole(log: _Log) -> np.ndarray:
    return np.minimum(log.slots.product(log.weight), _LARGEST)


_OF_SLATES: dict[str, Callable[[_Log], _Statistic]] = {
    "sips": lambda log: _slate_weighted(log, _whole(log)),
    "iips": lambda log: _slate_weighted(log, log.weight),
    "rips": lambda log: _slate_weighted(log, _running(log)),
    "cascade_dr": _cascade_dr,
    "snsips": lambda log: _slate_normalised(log, _whole(log)),
    "sniips": lambda log: _position_normalised(log, log.weight),
    "snrips": lambda log: _position_normalised(log, _running(log)),
}
_ESTIMATORS: dict[str, Callable[[_Log], _Statistic]] = {
    "ips": lambda log: _weighted(log, log.weight),
    "snips": lambda log: _normalised(log, log.weight),
    "ncis": lambda log: _normalised(log, np.minimum(log.weight, log.cap)),
    "dr": lambda log: _corrected(log, np.minimum(log.weight, log.cap)),
    "dm": _direct,
    "sndr": _normalised_dr,
    "switch_dr": _switch,
    "dros": _shrunk,
    **_OF_SLATES,
}


def _estimates(log: _Log, made: dict[str, _Statistic], level: float, draws: int, seed: int) -> dict[str, Estimate]:
    if not made:
        return {}
    sums = np.concatenate([x.sums for x in made.values()], axis=1)
    drawn = resampled_sums(sums, draws, seed)
    totals = np.concatenate([sums.sum(axis=0, keepdims=True), drawn])  # the log itself first
    parts = np.split(totals, np.cumsum([x.sums.shape[1] for x in made.values()])[:-1], axis=1)
    units = len(sums)
    result = {}
    for (name, statistic), part in zip(made.items(), parts, strict=True):
        values = statistic.value(part)
        weight = statistic.weight
        ess = math.nan if weight is None else float(weight.sum() ** 2 / (weight**2).sum())
        value, low, high, note = float(values[0]), math.nan, math.nan, ""
        counted, kind = units, "units"
        if statistic.has_event is not None:
            counted, kind = int(np.count_nonzero(log.sums(statistic.has_event))), "units have any reward"
            kind += " of weight above 0" if counted < np.count_nonzero(log.sums(log.reward != 0.0)) else ""
        if not np.isfinite(value):
            note, value = _why_undefined(name, value, weight), math.nan
        elif not np.isfinite(values[1:]).any():
            note = "no interval: weights or rewards are too large"
        elif counted < MIN_EVENTS:
            note = f"no interval: {counted} {kind}, it needs {MIN_EVENTS}"
        else:
            finite = values[1:][np.isfinite(values[1:])]  # a draw may have no weight at all
            low, high = (float(x) for x in np.quantile(finite, [0.5 - level / 2, 0.5 + level / 2]))
        result[name] = Estimate(value, low, high, units, ess, note)
    return result


def _why_undefined(name: str, value: float, weight: np.ndarray | None) -> str:
    if weight is not None and not weight.any():
        return "all weights are 0: the target policy takes none of the logged decisions"
    if name in ("sniips", "snrips") and np.isnan(value):
        return "all weights of a position are 0: the target policy takes none of its logged decisions"
    return "weights or rewards are too large"


def _check_names(estimators: Sequence[str], slate_id: Any, position: Any) -> None:
    if isinstance(estimators, str):
        raise ValueError(f"estimators={estimators!r} is one string; give a tuple of names, such as ({estimators!r},)")
    for name in estimators:
        if name not in _ESTIMATORS:
            raise ValueError(f"unknown estimator {name!r}; choose among {', '.join(_ESTIMATORS)}")
        if name in _OF_SLATES and slate_id is None:
            raise ValueError(f"estimator {name!r} needs slate_id=, the id of each row's slate")
    if position is not None and slate_id is None:
        raise ValueError("position= is of slots in slates; give slate_id= as well")


def _weights(pscore: Any, target_pscore: Any, rows: int) -> np.ndarray:
    """Return target_pscore / pscore, [n]."""
    checked = []
    for name, values, lowest in (("pscore", pscore, "above 0"), ("target_pscore", target_pscore, "0 or more")):
        p = column(name, values, ("reward", rows), finite=False).astype(np.float64)
        wrong = np.flatnonzero(~((p > 0.0 if name == "pscore" else p >= 0.0) & (p <= 1.0 + _ROUNDING)))
        if len(wrong):
            raise ValueError(f"{name} of row {wrong[0]} is {p[wrong[0]]}; probabilities are {lowest} and at most 1")
        checked.append(p)
    with np.errstate(over="ignore"):
        return np.minimum(checked[1] / checked[0], _LARGEST)


def _units(group: Iterable[Hashable] | None, slots: slates.Slates, rows: int) -> np.ndarray:
    if group is None:
        return slots.slate
    unit = unit_numbers(group, rows=rows)
    apart = np.flatnonzero(unit != unit[slots.above])
    if len(apart):
        raise ValueError(
            f"group of row {apart[0]} differs from that of row {slots.above[apart[0]]}, of the same slate; "
            "all rows of a slate belong to one group"
        )
    return unit


def _model(reward_model: Any, rows: int) -> tuple[np.ndarray, np.ndarray] | None:
    if reward_model is None:
        return None
    if not isinstance(reward_model, (tuple, list)) or len(reward_model) != 2:
        raise ValueError(
            "reward_model must be a pair: the model's reward of the logged decisions, and its expectation under the "
            "target policy"
        )
    names = ("reward_model[0]", "reward_model[1]")
    made = [column(n, x, ("reward", rows)).astype(np.float64) for n, x in zip(names, reward_model, strict=True)]
    return made[0], made[1]
