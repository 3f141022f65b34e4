"""What a source's simulator, or a run's feedback model, says of policies: A/B tests, A/A tests, exploitation gap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.abtest import aa, simulate, simulate_days
from mmrf_jax.agents import registry
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.envs import learned, rankers
from mmrf_jax.envs.environment import Environment
from mmrf_jax.io.progress import counted, phase
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import simulator_source, sources, steps, train_state
from mmrf_jax.training.train_state import TrainState
from mmrf_jax.training.trained_run import TrainedRun

#: Upper limits on the requests that sessions of the model exploitation gap start from: in total, and per session.
_GAP_POOL, _GAP_POOL_A_SESSION = 8_192, 4
_MAX_SESSION = 64  # requests, if a config sets no maximum session length


def ab_key(seed: int) -> types.Key:
    """Return the PRNG key of a seed's A/B test, whose users are 0, 1, …"""
    return jax.random.fold_in(types.make_key(seed), 12)


def run_ab_test(
    source: sources.Source,
    policies: dict[str, Any],
    partitioner: Partitioner,
    *,
    days: int = 1,
    hashed: bool = False,
    cuped: bool = False,
    always_valid: bool = False,
    observe: Callable[[Mapping[str, Mapping[str, np.ndarray]]], object] = lambda sums: None,
) -> dict[str, Any]:
    """Run an A/B test in the source's simulator, with progress; the first arm is the control.

    Args:
      days: simulated days; above 1, users return (`simulate_days.simulate_ab_test_by_day`).
      hashed: whether each user is in one arm, by hash, instead of in all of them.
      cuped: as in `simulate.Design`.
      always_valid: as in `simulate.Design`.
      observe: as in `simulate.simulate_ab_test`, for tests of one day.

    Raises:
      ValueError: without a simulator, or for days outside the simulator's range.
    """
    names, config = list(policies), source.config
    sim, key = _simulator(source)
    salt = f"A/B test of seed {config.seed}" if hashed else None
    design = simulate.Design(names[0], config.ab_test.sessions, salt, cuped, always_valid)
    test, first_day = (sim, policies, key, partitioner, design), config.ab_test.day
    progress = counted("ab_test", design.num_users * len(names) * days)
    if days == 1:
        return simulate.simulate_ab_test(*test, day=first_day, progress=progress, observe=observe)
    simulator_source.check_days(config, days)
    return simulate_days.simulate_ab_test_by_day(*test, first_day=first_day, days=days, progress=progress)


def run_aa_tests(
    source: sources.Source, policy: rankers.AnyRanker, partitioner: Partitioner, tests: int, cuped: bool = False
) -> dict[str, Any]:
    """Return `abtest.aa.coverage` of 2 × config.ab_test.sessions sessions served by one policy."""
    number, day = 2 * source.config.ab_test.sessions, source.config.ab_test.day
    sim, key = _simulator(source)
    phase("serve")
    sums = simulate.rollout_user_metrics(sim, policy, key, partitioner, user_ids=np.arange(number), day=day)
    means = simulate.history_means(sim, key, sums["user_id"], day, min(simulate.BLOCK, number)) if cuped else None
    phase("aa_tests")
    return aa.coverage(
        sim.signals, {name: x for name, x in sums.items() if name not in simulate.NOT_TESTED}, tests, means
    )


def _simulator(source: sources.Source) -> tuple[Environment, types.Key]:
    """Return the simulator of a source's A/B tests and its PRNG key.

    Raises:
      ValueError: for a source without a simulator.
    """
    if source.sim is None:
        raise ValueError(
            f"A/B tests need a simulator, but config.source is {source.config.source!r}; use the config `world`, or "
            "config.simulator=feedback with config.simulator_checkpoint=RUN"
        )
    return source.sim.with_items(source.items), ab_key(source.config.seed)


def feedback_simulator(
    source: sources.Source, plan: steps.TrainConfig, state: TrainState, log: Sessions, **options: Any
) -> learned.LearnedEnv:
    """Return the run's feedback model as a simulator over the session starts of a log."""
    world = source.config.world
    longest = _MAX_SESSION if world is None else world.max_requests
    return learned.make_learned_env(train_state.model_of(state), source.items, plan.feedback, log, longest, **options)


def model_exploitation_gap(run: TrainedRun, log: Sessions) -> dict[str, float]:
    """Compute the newest policy's return in the feedback model and in the source's simulator: main signal per session.

    Args:
      run: its `arms` are those of its A/B test; sharing that test's compiled program avoids a new compilation.
      log: the log whose session starts the feedback model simulates.

    Returns:
      {"model", "world", "gap"}; "gap" is model − world, the model exploitation gap: how far the policy profits from
      errors of the model.
    """
    config, source, partitioner = run.config, run.source, run.partitioner
    policy = registry.get(run.plan.method).make_policy(run.state.agents, source.items, run.plan.agents)
    pool = min(_GAP_POOL, _GAP_POOL_A_SESSION * config.collect.sessions)  # the same size for the log of every round
    model = feedback_simulator(source, run.plan, run.state, log, pool_requests=pool)
    number = config.alternation.gap_sessions
    key = jax.random.fold_in(types.make_key(config.seed), 13)
    chosen = rankers.choices({**run.arms, config.method: policy})[config.method]
    world, capacity = _simulator(source)[0], simulate.block_users(config.ab_test.sessions, partitioner)
    serving: dict[str, tuple[Environment, Any, int]] = {
        "model": (model, policy, number),
        "world": (world, chosen, capacity),
    }
    earned, done = {}, counted("model_exploitation_gap", 2)
    for name, (sim, ranker, most) in serving.items():
        served = simulate.rollout_user_metrics(
            sim, ranker, key, partitioner, user_ids=np.arange(number), day=0, capacity=most
        )
        earned[name] = float(served[source.spec.signals.main].mean())
        done(len(earned))
    return earned | {"gap": earned["model"] - earned["world"]}
