"""Growth of cost and memory with problem size; each size runs in a separate process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax import types
from mmrf_jax.abtest import simulate
from mmrf_jax.cli import common
from mmrf_jax.cli.benchmarks import cost, speed
from mmrf_jax.data import stream
from mmrf_jax.data.readers.kuairand import SyntheticLog, prepare_log
from mmrf_jax.envs.short_video import env, parameters
from mmrf_jax.io.progress import counted, say
from mmrf_jax.models import embedding_table, rowwise
from mmrf_jax.parallel import preemption
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import simulator_source

_IDS, _DIM = 8_192, 16  # ids per batch, and row size
_STEPS = 50
_USERS = 20_000  # per timing of a world
_JOB = (f"--config={common.WORLD}", "--config.quick=True", "--config.alternation.rounds=1", "--config.log_every=1")
_BATCH, _SEGMENT, _BATCHES = 128, 4, 300  # segments per batch, requests per segment, and number of batches read


def tables(rows: int, repeats: int) -> dict[str, tuple[float, str]]:
    """Time a lookup, its gradient and the row update; ids follow popularity (Zipf), or are uniform."""
    step = jax.jit(_table_step, donate_argnums=0)
    t = jax.jit(functools.partial(embedding_table.init_table, num_rows=rows, dim=_DIM, scale=0.02))(types.make_key(0))
    rng, cost = np.random.default_rng(0), {}

    def place(rank):
        return (rank * 2654435761) % rows  # scatters the popular rows

    draws = {
        "zipf": lambda: place(np.exp(rng.random(_IDS) * np.log(rows + 1.0)).astype(np.int64) - 1),
        "uniform": lambda: rng.integers(0, rows, _IDS),
    }
    for name, draw in draws.items():
        times = []
        for _ in range(repeats + 1):  # the first compiles
            ids = [jnp.asarray(draw(), jnp.int32) for _ in range(_STEPS)]
            jax.block_until_ready((t, ids))
            start = time.perf_counter()
            for batch in ids:
                t = step(t, batch)
            jax.block_until_ready(t)
            times.append((time.perf_counter() - start) / _STEPS)
        cost[f"step, {name} ids"] = (1e3 * float(np.median(times[1:])), "ms")
    return cost


def _table_step(t: embedding_table.Table, ids: jax.Array) -> embedding_table.Table:
    grads = jax.grad(lambda rows: jnp.sum(jnp.sin(rows)))(embedding_table.lookup(t, ids))
    return rowwise.row_update(t, ids, grads, 0.1)


def videos(number: int, repeats: int) -> dict[str, tuple[float, str]]:
    """Time a live request in a world with `number` videos, under production's policy."""
    sim = env.make_world(parameters.WorldConfig(num_videos=number))
    serving = speed.Serving(sim, simulator_source.world_policies()["production"])
    return {"request": (1e6 / speed.requests_a_second(serving, _USERS, repeats), "us")}


def users(number: int, repeats: int) -> dict[str, tuple[float, str]]:
    """Time a live request of an A/B test with `number` users, in blocks, under the random policy."""
    del repeats
    sim, partitioner = env.make_world(parameters.WorldConfig()), Partitioner()
    policies = {"random": simulator_source.world_policies()["random"]}

    def served(number: int) -> dict[str, Any]:
        design = simulate.Design("random", number)
        test = simulate.simulate_ab_test(sim, policies, types.make_key(1), partitioner, design, day=0)
        return test["ab_test"]["random"]

    served(min(number, simulate.BLOCK))  # compiles
    start = time.perf_counter()
    result = served(number)
    live = number * result["requests"]["mean"]
    return {"request": (1e6 * (time.perf_counter() - start) / live, "us")}


def processes(number: int, repeats: int) -> dict[str, tuple[float, str]]:
    """Time the median step of the quick job with `number` processes, which share this machine's cores."""
    del repeats
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        job = ["-m", "mmrf_jax.cli", "train", *_JOB, f"--workdir={workdir}"]
        several = [sys.executable, "-m", "mmrf_jax.cli", "multiprocess", f"--num_processes={number}"]
        command = [*several, "--", *job]
        with (Path(folder) / "said").open("w+") as said:
            run = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=said, stderr=said)
            try:
                while run.poll() is None and not (workdir / "learned.json").exists():
                    time.sleep(0.05)
            finally:
                run.terminate()  # the evaluation is not needed
                run.wait()
            if run.returncode not in (0, preemption.EXIT_CODE):
                said.seek(0)
                raise RuntimeError(f"{number} processes ended with {run.returncode}: {said.read()[-2000:]}")
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for phase in ("fit", "train"):
        times = [row["seconds"] for row in rows if row["phase"] == phase]
        found[f"step, {phase}"] = (1e3 * float(np.median(np.diff(times))), "ms")
    return found


def logs(rows: int, repeats: int) -> dict[str, tuple[float, str]]:
    """Time a synthetic log in the layout of real logs: preparing its records, and streaming batches of them."""
    del repeats
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "log", Path(folder) / "records"
        made = SyntheticLog(rows=rows, users=rows // 2_000, videos=rows // 10)
        made.write(source, counted)
        start = time.perf_counter()
        prepared = prepare_log(source, out)
        took = time.perf_counter() - start
        part = stream.LogPart(prepared.parts["train"], 0, (0, 1), lambda log: None)
        every = np.ones(len(part.number), bool)
        batches = stream.BatchRows(part, np.arange(_BATCH), _BATCH, _SEGMENT, every, [0])
        batches.get(0, 0)
        start = time.perf_counter()
        for at in range(1, _BATCHES + 1):
            batches.get(0, at)
        read = (time.perf_counter() - start) / _BATCHES
    return {"prepared row": (1e6 * took / rows, "us"), "batch read": (1e3 * read, "ms")}


#: What grows: its function, and its sizes.
PARTS: dict[str, tuple[Callable[[int, int], dict[str, tuple[float, str]]], tuple[int, ...]]] = {
    "rows": (tables, (10**5, 10**6, 10**7, 10**8)),
    "videos": (videos, (10**4, 10**5, 10**6, 10**7)),
    "users": (users, (10**4, 10**5, 10**6, 10**7)),
    "processes": (processes, (1, 2, 4)),
    "logs": (logs, (10**5, 10**6, 10**7)),
}


def scale(parts: list[str], max_size: int, repeats: int) -> list[dict[str, Any]]:
    """Return the results of the parts, by size; "memory" is the peak of the size's process or one of its children."""
    todo = [(part, size) for part in parts for size in PARTS[part][1] if size <= max_size]
    done = counted("scale", len(todo))
    results: list[dict[str, Any]] = []
    for number, (part, size) in enumerate(todo, 1):
        say(f"{part}: {size:,}")
        found = cost.alone(_measured, part, size, repeats)
        results += [{"name": f"{part}/{what}/{size}", "value": v, "unit": unit} for what, (v, unit) in found.items()]
        done(number)
    for part in parts:
        sizes = [size for size in PARTS[part][1] if size <= max_size]
        for what in dict.fromkeys(entry["name"].split("/")[1] for entry in results if entry["name"].startswith(part)):
            values = {entry["name"]: entry["value"] for entry in results}
            curve = [values[f"{part}/{what}/{size}"] for size in sizes]
            if what != "memory":
                results.append({"name": f"{part}/{what}/growth", "value": max(curve) / min(curve), "unit": "ratio"})
    return results


def _measured(part: str, size: int, repeats: int) -> dict[str, tuple[float, str]]:
    found = PARTS[part][0](size, repeats)
    return found | {"memory": (cost.peak_memory(), "GiB")}
