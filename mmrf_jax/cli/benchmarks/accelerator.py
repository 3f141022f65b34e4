"""How busy a run keeps the devices: a cold main job, steps by batch size and of seeds side by side, and rollouts.

Each part runs in a separate process, which has the devices for itself. On CPUs all sizes are smaller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.abtest import simulate
from mmrf_jax.agents import registry
from mmrf_jax.cli import common
from mmrf_jax.cli.benchmarks import cost
from mmrf_jax.configs import world as experiment
from mmrf_jax.envs import rankers
from mmrf_jax.io import profile
from mmrf_jax.io.progress import counted, say
from mmrf_jax.parallel import programs
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import batches, compilation, configs, restore, side_by_side, steps
from mmrf_jax.training.on_device import DeviceBatches

_WARM = 3  # steps before those that are timed
_JOB_SHARE = 0.6  # of the time, after which the main job is ended


class Sizes(NamedTuple):
    """How much is measured."""

    job: tuple[str, ...]  # flags of the main job
    batches: tuple[int, ...]
    seeds: int  # side by side, with the smallest batch
    sessions: int  # of the log that steps learn from
    timed: int  # steps per timing
    traced: int  # steps of the trace
    users: tuple[int, ...]  # of a rollout
    videos: int
    limit: float  # seconds of all parts together


_WHOLE = Sizes((), (32, 512, 2_048), 8, 8_192, 200, 20, (10**4, 10**5, 10**6), 100_000, 480.0)
_SMALL = Sizes(
    ("--config.quick=True", "--config.alternation.rounds=1", "--config.collect.sessions=256"),
    (8, 16, 32),
    2,
    128,
    2,
    1,
    (256, 1_024),
    3_000,
    7_200.0,
)

Entries = Iterator[tuple[str, float, str]]


def main_job(sizes: Sizes) -> Entries:
    """Time the main job in a process that has compiled nothing before: in all, and by activity."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        command = [sys.executable, "-m", "mmrf_jax.cli", "train", f"--config={common.WORLD}", *sizes.job]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "programs")}
        start = time.perf_counter()
        done = subprocess.run(  # its progress is the suite's
            [*command, f"--workdir={workdir}"],
            env=environment,
            stdout=subprocess.DEVNULL,
            timeout=_JOB_SHARE * sizes.limit,
            check=False,
        )
        took = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"the main job ended with exit code {done.returncode}")
        last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    yield "main job/wall", took, "s"
    for name, value in last.items():
        if name.startswith("seconds_"):
            yield f"main job/{name.removeprefix('seconds_')}", value, "s"


class _Setup(NamedTuple):
    """Runs that differ in their seeds alone, on a log that stays on the devices, before their first step."""

    seeds: side_by_side.Seeds
    source: Any
    plan: steps.TrainConfig
    compiled: programs.Ahead
    data: list[DeviceBatches]  # of each run
    states: Any  # joined
    encodings: Any  # joined

    @property
    def requests(self) -> float:
        """Return the mean number of requests of a segment."""
        return self.data[0].requests / self.data[0].segments


def _set_up(batch: int, sizes: Sizes, number: int = 1) -> _Setup:
    """Collect a log and initialise the states of `number` runs, while the programs of the steps compile."""
    config = experiment.get_config()
    config.world.num_videos, config.collect.sessions = sizes.videos, sizes.sessions
    config.feedback.batch = config.train.batch = batch
    config.train.log_on_device = True
    run, partitioner = configs.run_of(config.to_dict()), Partitioner()
    source, compiled = restore.source_of(run, partitioner), programs.Ahead()
    plan = steps.plan_of(run, source.spec.signals)
    shapes = restore.state_shapes(run, source, partitioner)
    seeds = side_by_side.Seeds(number, shapes, partitioner)
    compilation.compile_steps_ahead(compiled, run, plan, source, seeds)
    assert source.train_on_devices is not None
    log = source.train_on_devices(partitioner, plan.agents.discount)
    every = [dataclasses.replace(run, seed=seed) for seed in range(number)]
    start, states, encodings = compilation.init_program(partitioner, shapes), {}, {}
    for one in every:
        states[one.seed] = start(*compilation.init_args(one, plan, source, log.feedback_statistics))
        found = steps.precompute_item_embeddings(states[one.seed], source.items, plan)
        encodings[one.seed] = None if found is None else partitioner.replicate(found)
    data = [DeviceBatches(one, log, partitioner) for one in every]
    return _Setup(seeds, source, plan, compiled, data, seeds.join(states), seeds.join(encodings))


@contextlib.contextmanager
def _steps(run: _Setup, name: str, states: Any, most: int) -> Iterator[Callable[[int], Any]]:
    """Return a context with a function that takes a number of steps of each run and returns the states.

    Args:
      name: `fit` or `update`.
      states: donated.
      most: number of steps in all.
    """
    part, program, more = {
        "fit": ("feedback", steps.fit_step, ()),
        "update": ("train", steps.update_step, (run.encodings,)),
    }[name]
    run.compiled.wait("fit" if name == "fit" else "train", say=say)
    epochs = -(-most // run.data[0].per_epoch(part))
    with contextlib.ExitStack() as opened:
        iterators = [
            opened.enter_context(batches.PhaseIterator(data, part, 0, epochs, 0, lambda progress: 1.0))
            for data in run.data
        ]

        def take(number: int) -> Any:
            nonlocal states
            for _ in range(number):
                inputs = {i: next(iterator) for i, iterator in enumerate(iterators)}
                states, _ = run.seeds.step(program, states, inputs, run.source.items, run.plan, *more)
            return jax.block_until_ready(states)

        yield take


def _seconds(take: Callable[[int], Any], sizes: Sizes) -> float:
    """Return the seconds of a step, after some that are not timed."""
    take(_WARM)
    began = time.perf_counter()
    take(sizes.timed)
    return (time.perf_counter() - began) / sizes.timed


def steps_of(batch: int) -> Callable[[Sizes], Entries]:
    """Return a part that measures the steady fit and update with batches of `batch` segments, their making included."""

    def measure(sizes: Sizes) -> Entries:
        run = _set_up(batch, sizes)
        states = run.states
        for name in ("fit", "update"):
            with _steps(run, name, states, _WARM + sizes.timed + sizes.traced) as take:
                rate = batch * run.requests / _seconds(take, sizes)
                with tempfile.TemporaryDirectory() as folder:
                    with jax.profiler.trace(folder, profiler_options=_quiet()):
                        states = take(sizes.traced)
                    seen = profile.device_time(Path(folder))
            yield f"{name}/batch={batch}", rate, "requests/s"
            yield f"{name}/batch={batch}/busy", seen.busy, "of the time"
            yield f"{name}/batch={batch}/kernels", seen.kernels / sizes.traced, "a step"

    return measure


def seeds(sizes: Sizes) -> Entries:
    """Measure steps of seeds side by side against those of one, with the smallest batch.

    Yields the requests per second of all seeds together, and how many times as long a step takes as that of one.
    """
    batch, taken = sizes.batches[0], {}
    for number in (1, sizes.seeds):
        run = _set_up(batch, sizes, number)
        states = run.states
        for name in ("fit", "update"):
            with _steps(run, name, states, _WARM + sizes.timed) as take:
                taken[name, number] = _seconds(take, sizes)
                states = take(0)
            yield f"{name}/seeds={number}", number * batch * run.requests / taken[name, number], "requests/s"
    for name in ("fit", "update"):
        yield f"{name}/seeds={sizes.seeds}/time", taken[name, sizes.seeds] / taken[name, 1], "times one's"


def _quiet() -> jax.profiler.ProfileOptions:
    """Return options of a trace without Python's calls, whose recording keeps the device waiting."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options


def rollouts(sizes: Sizes) -> Entries:
    """Measure live requests of rollouts of the random policy and of the agents; both share a program."""
    config = experiment.get_config()
    config.world.num_videos = sizes.videos
    run, partitioner = configs.run_of(config.to_dict()), Partitioner()
    source, compiled = restore.source_of(run, partitioner), programs.Ahead()
    sim, key = source.sim, types.make_key(1)
    assert sim is not None
    plan = steps.plan_of(run, source.spec.signals)
    start = compilation.init_program(partitioner, restore.state_shapes(run, source, partitioner))
    ones = (np.ones(len(source.spec.signals)),) * 3
    state = start(*compilation.init_args(run, plan, source, ones))
    agents = registry.get(run.method).make_policy(state.agents, source.items, plan.agents)
    arms = rankers.choices({"random": source.policies["random"], "mmrf": agents})
    sim = partitioner.replicate(sim.with_items(source.items))
    for users in sizes.users:

        def lower(users=users):
            return simulate.lower(sim, arms["mmrf"], key, partitioner, capacity=users)

        compiled.add(f"rollout of {users}", lower)
    for users in sizes.users:
        compiled.wait(f"rollout of {users}", say=say)
        for name, policy in arms.items():
            rates = []
            for call in range(3):  # the first may still compile
                began = time.perf_counter()
                sums = simulate.rollout_user_metrics(
                    sim, policy, key, partitioner, user_ids=np.arange(call * users, (call + 1) * users), day=0
                )
                rates.append(sums["requests"].sum() / (time.perf_counter() - began))
            yield f"rollout/{name}/users={users}", float(max(rates[1:])), "requests/s"


def _parts(sizes: Sizes) -> dict[str, Callable[[Sizes], Entries]]:
    """Return what is measured, in order."""
    by_batch = {f"batch={n}": steps_of(n) for n in sizes.batches}
    return {"job": main_job, **by_batch, "seeds": seeds, "rollouts": rollouts}


PARTS = tuple(_parts(_WHOLE))


def accelerator(parts: list[str], small: bool, save: Callable[[list[dict[str, Any]]], object]) -> list[dict[str, Any]]:
    """Return the results of the parts; "memory" is the peak of a part's device.

    Args:
      parts: of `PARTS`.
      small: whether to measure smaller sizes, as on CPUs: smaller batches, each instead of a part's.
      save: called with the results so far after each part.

    Raises:
      RuntimeError: at the end, for parts that failed or had no time.
    """
    sizes = _SMALL if small else _WHOLE
    chosen = [name for name, whole in zip(_parts(sizes), PARTS, strict=True) if whole in parts]
    start = time.perf_counter()
    done, results, failed = counted("accelerator", len(chosen)), [], []
    for number, name in enumerate(chosen, 1):
        say(name)
        try:
            left = max(sizes.limit - (time.perf_counter() - start), 0.0)
            entries, memory = cost.alone(_measured, name, sizes, limit=left)
        except Exception as error:  # the other parts are measured all the same
            failed.append(f"{name}: {error}")
            say(f"failed: {failed[-1]}")
        else:
            results += [{"name": what, "value": value, "unit": unit} for what, value, unit in entries]
            if name != "job":  # its processes are gone
                results.append({"name": f"{name}/memory", "value": memory, "unit": "GiB"})
        save(results)
        done(number)
    if failed:
        raise RuntimeError("; ".join(failed))
    return results


def _measured(name: str, sizes: Sizes) -> tuple[list[tuple[str, float, str]], float]:
    return list(_parts(sizes)[name](sizes)), cost.peak_memory()
