"""Long-running A/B tests: users return over simulated days, with a probability that depends on their sessions.

All users visit on the first day, and later on the days that `next_visit` gives, which depend on their sessions in that
arm. So the days after the first measure an arm's effect on visits, and a day's sessions are those of its visitors. A
difference per session may thus come from a difference in visitors, while metrics per user and day (`visits`,
such as `watch_time_per_day`) cover all users of an arm.

The state carried from day to day is the day of the next visit, the new videos, and the assignment to arms. The world
samples each day's initial history in closed form from users' base interests: histories do not contain what an arm
showed before, and interests that drifted in a session are reset on the next day. Agents are not updated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mmrf_jax.abtest import by_day, sequential, simulate, statistics
from mmrf_jax.envs import rankers, rollout
from mmrf_jax.envs.environment import Environment
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.signals import Signals

_NOT_SUMMED = ("user_id", "exposures", "next_visit")


def simulate_ab_test_by_day(
    env: Environment,
    arms: Mapping[str, rankers.AnyRanker],
    key,
    partitioner: Partitioner,
    design: simulate.Design,
    *,
    first_day: int,
    days: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict:
    """Run an A/B test over `days` days, with results by day and overall.

    Args:
      design: of the test; all users visit on `first_day`.
      progress: called with users × days done so far, out of num_users × arms × days, including days without a visit.

    Returns:
      "ab_test", "truncated_pct" and "sample_ratio_mismatch" of all sessions of the test, and
      "by_day": [{"day", "visitors": {arm: number}, "ab_test": metrics of the day's sessions, None if it has none}]
      and, for three days or more, "novelty_effect" (`by_day.novelty_effect`): how the effects of the second half of
      the days differ from those of the first half, excluding the first day, on which all users visit.

    Raises:
      ValueError: for an arm that gets fewer than two users.
    """
    names, policies = list(arms), rankers.choices(arms)
    users = simulate.assign(names, design)
    total = design.total(len(names))
    cohorts = {name: _Cohort(ids, first_day) for name, ids in users.items()}
    means = (
        simulate.history_means(env, key, np.arange(total), first_day, min(simulate.BLOCK, total))
        if design.cuped
        else None
    )
    covariate = None if means is None else {name: means[ids] for name, ids in users.items()}
    quantile = sequential.bonferroni_quantile(days) if design.always_valid else None
    half, done, rows = (days - 1) // 2, 0, []
    early: dict[str, dict[str, np.ndarray]] = {}
    late: dict[str, dict[str, np.ndarray]] = {}
    for day in range(first_day, first_day + days):
        today = {}
        for name, cohort in cohorts.items():
            today[name] = cohort.serve(env, policies[name], key, partitioner, day, capacity=total)
            done += len(cohort.user_ids)
            progress(done)
        visitors = {name: int(sums["sessions"].sum()) for name, sums in today.items()}
        found = _test(env.signals, today, design, covariate).results(quantile)
        rows.append({"day": day, "visitors": visitors, **found})
        for part, inside in ((early, 0 < day - first_day <= half), (late, first_day + days - day <= half)):
            if inside:
                for name, sums in today.items():
                    _add(part.setdefault(name, {}), {key: x for key, x in sums.items() if key != "exposures"})
    whole = {name: cohort.sums for name, cohort in cohorts.items()}
    cut, sessions = ({arm: float(sums[x].sum()) for arm, sums in whole.items()} for x in ("truncated", "sessions"))
    test = _test(env.signals, whole, design, covariate)
    result = simulate.conclude(test, env.signals, quantile, cut, sessions)
    if half:
        result["novelty_effect"] = by_day.novelty_effect(env.signals, early, late, design.control, design.paired)
    return result | {"by_day": rows}


class _Cohort:
    """The users of an arm: the day of their next visit, and the sums of their sessions so far."""

    def __init__(self, user_ids: np.ndarray, first_day: int):
        self.user_ids = user_ids
        self.due = np.full(len(user_ids), first_day)
        self.sums: dict[str, np.ndarray] = {}

    def serve(self, env, policy, key, partitioner: Partitioner, day: int, capacity: int) -> dict[str, np.ndarray]:
        """Serve a day; return its sums [n] over all users of the arm (0 without a visit) and add them to `sums`."""
        block = min(simulate.BLOCK * partitioner.num_devices, capacity)
        coming = np.flatnonzero(self.due == day)
        sums = {name: np.zeros(len(self.due)) for name in rollout.user_metrics(env.signals) if name not in _NOT_SUMMED}
        sums |= {"user_days": np.ones(len(self.due)), "sessions": 1.0 * (self.due == day)}
        sums["exposures"] = np.zeros((rollout.EXPOSURE_GROUPS, env.items.num_videos), np.int64)
        for start in range(0, len(coming), block):
            rows = coming[start : start + block]
            served = simulate.rollout_user_metrics(
                env, policy, key, partitioner, user_ids=self.user_ids[rows], day=day, capacity=block
            )
            for name, values in served.items():
                if name not in _NOT_SUMMED:
                    np.add.at(sums[name], rows, values)
            sums["exposures"] += served["exposures"]
            self.due[rows] = day + served["next_visit"].astype(int)
        _add(self.sums, sums)
        return sums


def _add(total: dict[str, np.ndarray], sums: Mapping[str, np.ndarray]) -> None:
    for name, values in sums.items():
        total[name] = total.get(name, 0) + values


def _test(signals: Signals, sums, design: simulate.Design, covariate) -> statistics.ABTest:
    """Return the test of arms held in memory."""
    test = statistics.ABTest(signals, tuple(sums), design.control, design.paired)
    tested = {arm: {name: x for name, x in own.items() if name not in simulate.NOT_TESTED} for arm, own in sums.items()}
    test.update(tested, covariate)
    return test
