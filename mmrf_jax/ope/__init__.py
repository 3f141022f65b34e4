"""Off-policy estimates from logged decisions. NumPy and SciPy only: importing this does not import JAX."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from mmrf_jax.estimate import Estimate, unit_numbers
from mmrf_jax.ope import estimators as _estimators

__all__ = ["estimate"]

_NAMES = ("ips", "snips", "ncis", "dr", "dm")


def estimate(
    reward: Sequence[Any],
    *,
    pscore: Sequence[Any],
    target_pscore: Sequence[Any],
    group: Sequence[Hashable] | None = None,
    estimators: Sequence[str] = ("ips", "snips", "ncis", "dr"),
    cap: float = 10.0,
    reward_model: tuple[Sequence[Any], Sequence[Any]] | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Estimate the mean reward of a target policy from a log of another policy.

    `ips` (Horvitz and Thompson, 1952) and `snips` (Swaminathan and Joachims, 2015) use the weights as they come, `ncis`
    (Gilotte et al., 2018) and `dr` (Dudík et al., 2011) weights of at most `cap`; `dm` is the reward model's word.

    Args:
      reward: [n] of the logged decisions.
      pscore: [n] probability of each decision under the policy that logged it, above 0.
      target_pscore: [n] its probability under the target policy.
      group: [n] ids of independent units, such as sessions, which the bootstrap draws; None for each row alone.
      estimators: of `ips`, `snips`, `ncis`, `dr`, `dm`.
      cap: the largest weight of `ncis` and `dr`.
      reward_model: (q of the logged decision, its expectation under the target policy), [n] each. None: the mean
        reward, which makes `dr` a control variate.
      level: coverage of the percentile intervals.
      draws: bootstrap samples.
      seed: of the bootstrap.

    Returns:
      {name: Estimate}; `n` is the number of groups, `ess` the effective sample size of the estimator's weights.

    Raises:
      ValueError: for an unknown estimator, shapes that disagree, or probabilities that cannot be.

    Example:
      >>> found = estimate([1, 0, 1, 0], pscore=[0.5] * 4, target_pscore=[0.9, 0.1, 0.9, 0.1])
      >>> round(found["ips"].value, 3), round(found["snips"].value, 3)
      (0.9, 0.9)
    """
    unknown = [name for name in estimators if name not in _NAMES]
    if unknown:
        raise ValueError(f"unknown estimator {unknown[0]!r}; choose among {', '.join(_NAMES)}")
    rewards, logged, target = (np.asarray(x, np.float64) for x in (reward, pscore, target_pscore))
    for name, p, lowest in (("pscore", logged, "above 0"), ("target_pscore", target, "0 or more")):
        if p.shape != rewards.shape or rewards.ndim != 1:
            raise ValueError(f"{name} has shape {p.shape} and reward {rewards.shape}; give one number for each row")
        wrong = np.flatnonzero(~((p > 0.0 if name == "pscore" else p >= 0.0) & (p <= 1.0)))
        if len(wrong):
            raise ValueError(f"{name} of row {wrong[0]} is {p[wrong[0]]}; probabilities are {lowest} and at most 1")
    unit = unit_numbers(range(len(rewards)) if group is None else group)
    mean = np.full(len(rewards), rewards.mean())
    predicted, direct = (mean, mean) if reward_model is None else (np.asarray(x, np.float64) for x in reward_model)
    with np.errstate(divide="ignore"):
        log_weight = np.where(target > 0.0, np.log(np.maximum(target, 1e-300)), -690.0) - np.log(logged)
    decisions = _estimators.LoggedDecisions(unit, log_weight, rewards[:, None], predicted[:, None], direct[:, None])
    caps = (float(cap), np.inf)
    found = _estimators.estimate(decisions, ("reward",), caps, draws, seed, level)
    entries, capped = found["signals"]["reward"], f"{float(cap):g}"
    of = {
        "ips": (entries["ips"]["inf"], "inf"),
        "snips": (entries["ncis"]["inf"], "inf"),
        "ncis": (entries["ncis"][capped], capped),
        "dr": (entries["dr"][capped], capped),
        "dm": (entries["dm"], None),
    }
    result = {}
    for name in estimators:
        entry, weights = of[name]
        low, high = entry["ci95"] or (float("nan"), float("nan"))
        ess = float("nan") if weights is None else found["weights"][weights]["ess"]
        result[name] = Estimate(entry["value"], low, high, found["users"], ess, entry.get("note", ""))
    return result
