"""How busy a run keeps the devices: a cold main job, steady steps by batch size, and rollouts by number of users.

Each part runs in a separate process, which has the devices for itself. On CPUs all sizes are smaller.
"""

from __future__ import annotations

import itertools
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
from mmrf_jax.training import batches, compilation, configs, restore, steps
from mmrf_jax.training.on_device import DeviceBatches

_K = 6  # videos of a slate
_WARM = 3  # steps before those that are timed
_JOB_SHARE = 0.6  # of the time, after which the main job is ended


class Sizes(NamedTuple):
    """How much is measured."""

    job: tuple[str, ...]  # flags of the main job
    batches: tuple[int, ...]
    sessions: int  # of the log that steps learn from
    timed: int  # steps per timing
    traced: int  # steps of the trace
    users: tuple[int, ...]  # of a rollout
    videos: int
    limit: float  # seconds of all parts together


_WHOLE = Sizes((), (32, 512, 2_048), 8_192, 200, 20, (10**4, 10**5, 10**6), 100_000, 480.0)
_SMALL = Sizes(
    ("--config.quick=True", "--config.alternation.rounds=1", "--config.collect.sessions=256"),
    (8, 16, 32),
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
    """A run on a log that stays on the devices, before its first step."""

    config: configs.Run
    partitioner: Partitioner
    source: Any
    plan: steps.TrainConfig
    compiled: programs.Ahead
    data: DeviceBatches
    state: Any


def _set_up(batch: int, sizes: Sizes) -> _Setup:
    """Collect a log and initialise a state, while the programs of the steps compile."""
    config = experiment.get_config()
    config.world.num_videos, config.collect.sessions = sizes.videos, sizes.sessions
    config.feedback.batch = config.train.batch = batch
    config.train.log_on_device = True
    run, partitioner = configs.run_of(config.to_dict()), Partitioner()
    source, compiled = restore.source_of(run, partitioner), programs.Ahead()
    plan = steps.plan_of(run, source.spec.signals)
    shapes = restore.state_shapes(run, source, partitioner)
    compilation.begin_steps(compiled, run, plan, source, shapes, partitioner)
    assert source.train_on_devices is not None
    data = DeviceBatches(run, source.train_on_devices(partitioner, plan.agents.discount), partitioner)
    start = compilation.initial(partitioner, shapes)
    state = start(*compilation.initial_args(run, plan, source, data.feedback_statistics(plan.agents.discount)))
    return _Setup(run, partitioner, source, plan, compiled, data, state)


def steps_of(batch: int) -> Callable[[Sizes], Entries]:
    """Return a part that measures the steady fit and update with batches of `batch` segments, their making included."""

    def measure(sizes: Sizes) -> Entries:
        run = _set_up(batch, sizes)
        requests = batch * run.data.requests / run.data.segments
        encodings = steps.precompute_item_embeddings(run.state, run.source.items, run.plan)
        encodings = None if encodings is None else run.partitioner.replicate(encodings)
        programs_of = {
            "fit": ("feedback", steps.fit_step, ()),
            "update": ("train", steps.update_step, (encodings,)),
        }
        state = run.state
        for name, (part, program, more) in programs_of.items():
            run.compiled.wait("fit" if name == "fit" else "train", say=say)
            epochs = -(-(_WARM + sizes.timed + sizes.traced) // run.data.per_epoch(part))
            with batches.PhaseIterator(run.data, part, 0, epochs, 0, lambda progress: 1.0) as iterator:

                def take(number, state, iterator=iterator, program=program, more=more):
                    for made, rate in itertools.islice(iterator, number):
                        state, _ = program(state, made, run.source.items, run.plan, rate, *more)
                    return jax.block_until_ready(state)

                state = take(_WARM, state)
                began = time.perf_counter()
                state = take(sizes.timed, state)
                rate = sizes.timed * requests / (time.perf_counter() - began)
                with tempfile.TemporaryDirectory() as folder:
                    with jax.profiler.trace(folder, profiler_options=_quiet()):
                        state = take(sizes.traced, state)
                    seen = profile.device_time(Path(folder))
            yield f"{name}/batch={batch}", rate, "requests/s"
            yield f"{name}/batch={batch}/busy", seen.busy, "of the time"
            yield f"{name}/batch={batch}/kernels", seen.kernels / sizes.traced, "a step"

    return measure


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
    start = compilation.initial(partitioner, restore.state_shapes(run, source, partitioner))
    ones = (np.ones(len(source.spec.signals)),) * 3
    state = start(*compilation.initial_args(run, plan, source, ones))
    agents = registry.get(run.method).make_policy(state.agents, source.items, plan.agents)
    arms = rankers.choices({"random": source.policies["random"], "mmrf": agents})
    sim = partitioner.replicate(sim.with_items(source.items))
    for users in sizes.users:

        def lower(users=users):
            return simulate.lower(sim, arms["mmrf"], key, partitioner, k=_K, capacity=users)

        compiled.add(f"rollout of {users}", lower)
    for users in sizes.users:
        compiled.wait(f"rollout of {users}", say=say)
        for name, policy in arms.items():
            rates = []
            for call in range(3):  # the first may still compile
                began = time.perf_counter()
                sums = simulate.rollout_user_metrics(
                    sim, policy, key, partitioner, first_user=call * users, num_users=users, day=0, k=_K
                )
                rates.append(sums["requests"].sum() / (time.perf_counter() - began))
            yield f"rollout/{name}/users={users}", float(max(rates[1:])), "requests/s"


def _parts(sizes: Sizes) -> dict[str, Callable[[Sizes], Entries]]:
    """Return what is measured, in order."""
    return {"job": main_job, **{f"batch={n}": steps_of(n) for n in sizes.batches}, "rollouts": rollouts}


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
