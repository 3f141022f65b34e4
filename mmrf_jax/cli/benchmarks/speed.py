"""Speed of the program compared with what this machine could reach; each part runs in a separate process.

A result's limit is the roofline of the function's work as XLA counts it, with the rates of a large product and a
large copy measured in the same process; for a policy that only reads features, the rate of gathering them; for GAUC,
the rate of sorting its rows.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax import types
from mmrf_jax.abtest import simulate
from mmrf_jax.agents import registry
from mmrf_jax.agents.mmrf.policy import make_actor_ranker as make_policy
from mmrf_jax.cli import common
from mmrf_jax.cli.benchmarks import cost
from mmrf_jax.configs import world as experiment
from mmrf_jax.data import sessions
from mmrf_jax.data.readers.kuairand import SyntheticLog, prepare_log
from mmrf_jax.envs import learned, rankers, rollout
from mmrf_jax.envs.environment import Environment
from mmrf_jax.envs.short_video import env, parameters
from mmrf_jax.io.progress import counted
from mmrf_jax.metrics import ranking
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import batches, compilation, configs, restore, simulator_source, sources, steps, train_state
from mmrf_jax.training.train_state import TrainState

USERS = 4_096  # per call, by default
SIZES = (2**8, 2**12, 2**16, 2**20)  # users per timing of the random policy
_LARGEST_CALL = 2**16
_LEAST_USERS = 2**12  # per timing: smaller calls are repeated
_GATHERED = 2**14  # requests
_SESSIONS = 1_024  # of the training log
_LOG_ROWS = 5_000_000  # of the prepared log
_ROWS = 1_000_000  # impressions for GAUC
_BATCHES = 16


class Figure(NamedTuple):
    """A rate per second, and its limit if there is one."""

    name: str
    value: float
    unit: str
    limit: float | None = None


class Serving(NamedTuple):
    """A policy in an environment."""

    sim: Environment
    policy: rankers.AnyRanker


class Run(NamedTuple):
    """A run of the main job before its first step, with its first log. Its speed does not depend on its training."""

    source: sources.Source
    plan: steps.TrainConfig
    state: TrainState
    log: Any
    config: Any


def fresh_run(**overrides: Any) -> Run:
    config, partitioner = experiment.get_config(), Partitioner()
    config.collect.sessions = _SESSIONS
    config.update_from_flattened_dict(overrides)
    config = configs.run_of(config.to_dict())
    source = restore.source_of(config, partitioner)
    plan = steps.plan_of(config, source.spec.signals)
    log = source.train()
    start = compilation.init_program(partitioner, restore.state_shapes(config, source, partitioner))
    state = start(*compilation.init_args(config, plan, source, batches.feedback_statistics(log, plan.agents.discount)))
    return Run(source, plan, state, log, config)


def _features(weights: dict, carry: Any, request: Any) -> jax.Array:
    """Return scores [B, C], linear in the features of all candidates."""
    return weights["features"][request.candidates] @ weights["linear"]


def random_policy(sim: Environment) -> rankers.Ranker:
    """Return a uniform-slate policy that gathers all candidates' features: its zero weights are a program input."""
    features = sim.items.features
    weights = {"features": features, "linear": jnp.zeros(features.shape[1])}
    return rankers.Ranker(weights, rankers.nothing, _features, rankers.nothing, 1.0)


def requests_a_second(serving: Serving, users: int, repeats: int) -> float:
    """Return live requests per second, including resets, in sessions of `users` users."""
    partitioner, key = Partitioner(), types.make_key(1)
    sim, policy = partitioner.replicate((serving.sim, serving.policy))
    size = min(users, _LARGEST_CALL)
    calls = max(users, _LEAST_USERS) // size
    rates = []
    for repeat in range((repeats if users <= _LARGEST_CALL else 1) + 1):  # the first compiles
        start, live = time.perf_counter(), 0.0
        for call in range(calls if repeat else 1):
            first = (repeat * calls + call) * size
            sums = simulate.rollout_user_metrics(
                sim, policy, key, partitioner, user_ids=np.arange(first, first + size), day=0
            )
            live += float(sums["requests"].sum())
        rates.append(live / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def request_work(serving: Serving, slots: int = 256) -> cost.Work:
    """Return the work of a live request: a step of full slots, without resets, since session lengths vary."""
    begin = functools.partial(_begin, serving, slots)
    slots_now = jax.eval_shape(begin, types.make_key(0))

    def step(sim, policy, key, now):
        return rollout.step_slots(sim, policy, key, jnp.int32(0), now)

    return cost.work(step, serving.sim, serving.policy, types.make_key(0), slots_now).times(1 / slots)


def _begin(serving: Serving, slots: int, key):
    return rollout.idle(serving.sim, serving.policy, key, 0, slots, jnp.int32(0), slots, keep_history=False)


def _gathers(sim: Environment, repeats: int) -> float:
    """Return requests per second of a program that only gathers their candidates' features, more than caches hold."""
    request, *_ = jax.jit(sim.reset_env)(types.make_key(0), sim.default_params, jnp.arange(_GATHERED), jnp.int32(0))
    gather = jax.jit(lambda features, videos: features[videos])

    def once():
        return gather(sim.items.features, request.candidates)

    return _GATHERED / statistics.median(cost.seconds(once, 4 * repeats))


def world(repeats: int, max_users: int) -> Iterator[Figure]:
    """Measure rollouts of the random policy."""
    for candidates in (100, 400):
        sim = env.make_world(parameters.WorldConfig(candidates=candidates))
        limit = _gathers(sim, repeats)
        serving = Serving(sim, random_policy(sim))
        for users in SIZES if candidates == 100 else (USERS,):
            if users <= max_users:
                rate = requests_a_second(serving, users, repeats)
                yield Figure(f"world/random/C={candidates}/B={users}", rate, "requests/s", limit)


def whole_catalogue(repeats: int, max_users: int) -> Iterator[Figure]:
    """Measure rollouts where every video is a candidate of every request: no gather."""
    sim = env.make_world(parameters.WorldConfig(num_videos=100, candidates=100, slate=2))
    serving = Serving(sim, simulator_source.world_policies()["random"])
    limit = cost.machine(repeats).rate(request_work(serving))
    yield Figure(f"world/whole/C=100/B={USERS}", requests_a_second(serving, USERS, repeats), "requests/s", limit)


def ranker(repeats: int, max_users: int) -> Iterator[Figure]:
    """Measure rollouts of MMRF's policy."""
    machine = cost.machine(repeats)
    for candidates in (100, 400):
        run = fresh_run(**{"world.candidates": candidates})
        policy = make_policy(run.state.agents, run.source.items, run.plan.agents)
        assert run.source.sim is not None
        serving = Serving(run.source.sim, policy)
        limit = machine.rate(request_work(serving))
        for users in SIZES[:3] if candidates == 100 else (USERS,):
            if users <= max_users:
                rate = requests_a_second(serving, users, repeats)
                yield Figure(f"world/mmrf/C={candidates}/B={users}", rate, "requests/s", limit)


def model(repeats: int, max_users: int) -> Iterator[Figure]:
    """Measure rollouts in the feedback model."""
    run, machine = fresh_run(), cost.machine(repeats)
    sim = learned.make_learned_env(
        train_state.model_of(run.state), run.source.items, run.plan.feedback, run.log, run.config.world.max_requests
    )
    rankers = {
        "random": random_policy(sim),
        "mmrf": make_policy(run.state.agents, run.source.items, run.plan.agents),
    }
    for name, policy in rankers.items():
        serving = Serving(sim, policy)
        limit = machine.rate(request_work(serving))
        rate = requests_a_second(serving, USERS, repeats)
        yield Figure(f"model/{name}/C=100/B={USERS}", rate, "requests/s", limit)


def learning(repeats: int, max_users: int) -> Iterator[Figure]:
    """Measure batch input (in the background of training), steps of the fit and of the agents, and offline scoring."""
    run, machine = fresh_run(), cost.machine(repeats)
    index = sessions.segment_index(run.log, run.config.train.segment)
    index = index[np.random.default_rng(0).permutation(len(index))]
    size, partitioner = run.config.train.batch, Partitioner()

    def cut(rows):
        return partitioner.shard_inputs(sessions.gather_segments(run.log, rows, run.config.train.segment))

    batches = [cut(index[i * size : (i + 1) * size]) for i in range(min(_BATCHES, len(index) // size))]
    requests = sum(int(batch.mask[:, :-1].sum()) for batch in batches)

    def cuts():
        return [cut(index[i * size : (i + 1) * size]) for i in range(len(batches))]

    yield Figure("learning/input", requests / statistics.median(cost.seconds(cuts, repeats)), "requests/s")
    impressions = sum(int((batch.slate_mask[:, :-1] & batch.mask[:, :-1, None]).sum()) for batch in batches)
    items, plan, lr_scale = run.source.items, run.plan, jnp.float32(1.0)
    kept = steps.precompute_item_embeddings(run.state, items, plan)
    update = functools.partial(steps.update_step, encodings=kept)
    step: Callable
    for name, step, units, unit in (
        ("learning/fit", steps.fit_step, impressions, "impressions/s"),
        ("learning/update", update, requests, "requests/s"),
    ):
        limit = machine.rate(
            cost.work(functools.partial(step, plan=plan, lr_scale=lr_scale), run.state, batches[0], items)
        )
        state = jax.tree.map(jnp.copy, run.state)

        def run_steps(step=step):
            nonlocal state
            for batch in batches:
                state, _ = step(state, batch, items, plan=plan, lr_scale=lr_scale)
            return state

        value = units / statistics.median(cost.seconds(run_steps, repeats))
        yield Figure(name, value, unit, limit * units / len(batches))
    score = jax.jit(lambda *x: registry.score_candidates(*x, plan.agents, plan.method))

    def scores():
        return [score(run.state.agents, batch, items) for batch in batches]

    value = impressions / statistics.median(cost.seconds(scores, repeats))
    limit = machine.rate(cost.work(score, run.state.agents, batches[0], items)) * impressions / len(batches)
    yield Figure("offline/score", value, "impressions/s", limit)


def evaluating(repeats: int, max_users: int) -> Iterator[Figure]:
    """Measure GAUC of eight labels."""
    rng = np.random.default_rng(0)
    users, scores = rng.integers(0, _ROWS // 20, _ROWS), rng.random(_ROWS, np.float32)
    labels = {str(i): rng.random(_ROWS) < 0.3 for i in range(8)}

    def measure():
        return ranking.grouped_auc(users, scores, labels)["0"].value

    sort = statistics.median(cost.seconds(lambda: np.lexsort((scores, users)), repeats))
    yield Figure("offline/gauc", _ROWS / statistics.median(cost.seconds(measure, repeats)), "rows/s", _ROWS / sort)


def preparing(repeats: int, max_users: int) -> Iterator[Figure]:
    """Measure preparing a synthetic log, once; `mmrf prepare` reports rate and memory for any log."""
    with tempfile.TemporaryDirectory() as folder:
        log, out = Path(folder) / "log", Path(folder) / "records"
        SyntheticLog(rows=_LOG_ROWS, users=_LOG_ROWS // 2_000, videos=_LOG_ROWS // 10).write(log, counted)
        start = time.perf_counter()
        prepare_log(log, out)
        yield Figure("prepare/records", _LOG_ROWS / (time.perf_counter() - start), "rows/s")


def cold_start(repeats: int, max_users: int) -> Iterator[Figure]:
    """Measure the seconds from the command to the first agent update, which follows the fit, with a two-batch log."""
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(("compiled anew", "kept programs")):
            workdir = Path(folder) / str(number)
            command = [
                sys.executable,
                "-m",
                "mmrf_jax.cli",
                "train",
                f"--config={common.WORLD}",
                f"--workdir={workdir}",
            ]
            command += ["--config.collect.sessions=128", "--config.log_every=1"]
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "programs")}
            start = time.perf_counter()
            with subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as child:
                try:
                    while child.poll() is None and not _updated(workdir / "metrics.jsonl"):
                        time.sleep(0.05)
                    took = time.perf_counter() - start
                finally:
                    child.kill()
            yield Figure(f"start/{name}", took, "s")
            shutil.rmtree(workdir, ignore_errors=True)


def _updated(path: Path) -> bool:
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    return any(json.loads(row)["phase"] == "train" for row in rows if row.endswith("\n"))


def machine(repeats: int, max_users: int) -> Iterator[Figure]:
    """Measure a large product and a large copy."""
    measured = cost.machine(repeats)
    yield Figure("machine/product", measured.flops / 1e9, "GFLOP/s")
    yield Figure("machine/copy", measured.bytes / 1e9, "GB/s")


PARTS: dict[str, Callable[[int, int], Iterator[Figure]]] = {
    "machine": machine,
    "world": world,
    "whole": whole_catalogue,
    "ranker": ranker,
    "model": model,
    "learning": learning,
    "evaluating": evaluating,
    "prepare": preparing,
    "start": cold_start,
}


def speed(parts: list[str], repeats: int, max_users: int) -> list[dict[str, Any]]:
    """Return the results of the parts; "memory" is the peak of a part's process or device."""
    done = counted("speed", len(parts))
    results: list[dict[str, Any]] = []
    for number, part in enumerate(parts, 1):
        figures, memory = cost.alone(_measured, part, repeats, max_users)
        results += [_entry(Figure(*figure)) for figure in figures]
        results.append({"name": f"{part}/memory", "value": memory, "unit": "GiB"})
        done(number)
    return results


def _measured(part: str, repeats: int, max_users: int) -> tuple[list[tuple], float]:
    return [tuple(figure) for figure in PARTS[part](repeats, max_users)], cost.peak_memory()


def _entry(figure: Figure) -> dict[str, Any]:
    entry = {"name": figure.name, "value": figure.value, "unit": figure.unit}
    if figure.limit is not None:
        entry |= {"limit": figure.limit, "fraction_of_limit": figure.value / figure.limit}
    return entry
