"""How much saving slows steps down: a state with a large table, saved in the background to a disk or object storage.

A step updates 8,192 rows of the table by row-wise Adagrad and multiplies two matrices, about the work of the main job's
update. A save blocks it while the state is copied to the host, and then writes in other threads.
"""

from __future__ import annotations

import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mmrf_jax.checkpointing.manager import Checkpoints
from mmrf_jax.io.progress import say
from mmrf_jax.training import configs

_WIDTH, _IDS, _SIZE = 16, 8_192, 1_024  # floats of a row, rows updated in a step, rows and columns of the matrices
_STEPS = 30  # timed without a save


@functools.partial(jax.jit, donate_argnums=0)
def _step(state: dict[str, Any], number: jax.Array) -> dict[str, Any]:
    tables, dense = state["tables"], state["dense"]
    ids = jax.random.randint(jax.random.key(number), (_IDS,), 0, tables["rows"].shape[0])
    gradient = tables["rows"][ids] * 0.01
    sums = tables["sums"].at[ids].add(jnp.square(gradient).mean(-1))
    rows = tables["rows"].at[ids].add(-gradient / jnp.sqrt(sums[ids])[:, None])
    return {"tables": {"rows": rows, "sums": sums}, "dense": dense @ dense / jnp.linalg.norm(dense)}


def checkpoints(at: Path, rows: int, repeats: int) -> list[dict[str, Any]]:
    """Return the results of the suite.

    Args:
      at: folder of the checkpoints, on a disk or in object storage; those that are made are deleted.
      rows: of the table.
      repeats: saves; medians are given.
    """
    key = jax.random.key(0)
    tables = {"rows": jax.random.normal(key, (rows, _WIDTH)), "sums": jnp.ones(rows)}
    state = {"tables": tables, "dense": jax.random.normal(key, (_SIZE, _SIZE))}
    number, blocked, background, alone, meanwhile = 0, [], [], [], []

    def step() -> float:
        nonlocal state, number
        began, number = time.perf_counter(), number + 1
        state = jax.block_until_ready(_step(state, jnp.int32(number)))
        return time.perf_counter() - began

    step()
    with Checkpoints(at, keep=1) as saved:
        for save in range(1, repeats + 1):
            alone += [step() for _ in range(_STEPS)]
            began = time.perf_counter()
            saved.save(save, state)
            blocked.append(time.perf_counter() - began)
            while saved.saving():
                meanwhile.append(step())
            background.append(time.perf_counter() - began)
            say(f"save {save} of {repeats}: {blocked[-1]:.2f} s, written after {background[-1]:.1f} s")
            saved.wait()
        for made in saved.all_steps():
            saved.delete(made)
    every, one = configs.Run().checkpoint_every, statistics.median(alone)
    stall = 100 * statistics.median(blocked) / (every * one)
    results = [
        ("step", 1e3 * one, "ms"),
        ("step while a save is written", 1e3 * statistics.median(meanwhile or alone), "ms"),
        ("save", statistics.median(blocked), "s"),
        ("written after", statistics.median(background), "s"),
        (f"stall of {every} steps by a save", stall, "%"),
    ]
    return [{"name": f"checkpoints/{name}", "value": value, "unit": unit} for name, value, unit in results]
