"""Seeds side by side: runs that differ in their seeds alone, trained by one program.

The steps know nothing of seeds: `vmap` adds a leading axis to the states, the batches and the learning rates. With
several devices each has whole seeds, and a step only exchanges the batches, which arrive split by user. All else is
done for one seed after another, by programs that they share: logs, A/B tests and held-out logs fill the devices with
the users of one seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax import types
from mmrf_jax.io import trackers
from mmrf_jax.parallel import programs
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import configs, steps
from mmrf_jax.training.train_state import TrainState
from mmrf_jax.types import PyTree


def runs_of(config: configs.Run, workdir: Path) -> dict[Path, configs.Run]:
    """Return {run folder: config} of `config.seeds` runs, with the seeds from `config.seed` on.

    The config of each is that of a run of this seed alone. A single run has the folder itself.

    Raises:
      ValueError: if the folder of several is itself a run folder.
    """
    if config.seeds == 1:
        return {workdir: config}
    if (workdir / "config.json").exists():
        raise ValueError(
            f"--workdir={workdir} is a run folder, and config.seeds={config.seeds} makes one for each seed in it; use "
            "another --workdir"
        )
    every = (config.seed + i for i in range(config.seeds))
    return {workdir / f"seed{seed}": dataclasses.replace(config, seed=seed, seeds=1) for seed in every}


def check_side_by_side(config: configs.Run, seeds: int, partitioner: Partitioner) -> None:
    """Refuse what several seeds cannot do side by side; one seed can do everything.

    Raises:
      ValueError: naming the field, and what to use instead.
    """
    if seeds == 1:
        return
    if jax.process_count() > 1:
        raise ValueError(
            f"config.seeds={seeds}, but seeds are trained side by side in one process, and these are "
            f"{jax.process_count()}; start one process for each seed instead, with its own --config.seed"
        )
    partitioner.check_divisible(seeds, "seeds")
    if single := [name for name in config.trackers if name in trackers.ONE_AT_A_TIME]:
        raise ValueError(
            f"config.trackers has {single[0]!r}, which tracks one run at a time, but config.seeds={seeds}; leave it out"
        )


class Seeds:
    """The states of a number of runs as one, and its steps. For one run these are its own state and steps.

    Args:
      number: of runs; with more than one, a multiple of the devices.
      shapes: of the state of one, with its shardings (`restore.state_shapes`).
      partitioner: of the devices.
    """

    def __init__(self, number: int, shapes: TrainState, partitioner: Partitioner):
        self.number, self.shapes, self.partitioner = number, shapes, partitioner
        self._join = jax.jit(_joined, out_shardings=partitioner.data_sharding)
        self._take = partitioner.partition_init(_taken, shapes)

    def join(self, trees: Mapping[int, PyTree]) -> PyTree:
        """Join the trees of runs, by number from 0, along a new leading axis, which is split over the devices.

        The first stands for runs that are missing, which are done: what they compute is not used.
        """
        return next(iter(trees.values())) if self.number == 1 else self._join(self._every(trees))

    def take(self, states: TrainState, number: int) -> TrainState:
        """Return the state of a run, as a run alone has it on the devices."""
        return states if self.number == 1 else self._take(states, np.int32(number))

    def metrics_of(self, metrics: PyTree, number: int) -> PyTree:
        """Return the metrics of a run, on the host."""
        host = jax.device_get(metrics)
        return host if self.number == 1 else jax.tree.map(lambda x: x[number], host)

    def step(
        self,
        program: programs.Program,
        states: TrainState,
        inputs: Mapping[int, tuple[types.SessionBatch, Any]],
        items: types.Items,
        plan: steps.TrainConfig,
        *more: PyTree,
    ) -> tuple[TrainState, PyTree]:
        """Take a step of every run; return the next states and the metrics.

        Args:
          program: `steps.fit_step` or `steps.update_step`.
          states: joined; donated.
          inputs: batch and learning-rate factor of each run; see `join` for runs that are missing.
          items: of all runs.
          plan: of all runs.
          more: further arguments of the program, joined.
        """
        function, args = self._call(program, states, inputs, items, plan, more)
        return function(*args)

    def lower(self, program: programs.Program, batch: types.SessionBatch, lr_scale: Any, items, plan, *more) -> Any:
        """Lower the program of `step` for these inputs of each run, to compile it ahead of time."""
        states, inputs = self.shapes_of(self.shapes), {0: (batch, lr_scale)}
        function, args = self._call(program, states, inputs, items, plan, more)
        return function.lower(*args)

    def shapes_of(self, tree: PyTree) -> PyTree:
        """Return the shapes of joined trees, given those of one."""
        if self.number == 1:
            return tree
        sharding = self.partitioner.data_sharding
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((self.number, *x.shape), x.dtype, sharding=sharding), tree)

    def _call(self, program, states, inputs, items, plan, more) -> tuple[programs.Program, tuple]:
        if self.number == 1:
            ((batch, lr_scale),) = inputs.values()
            return program, (states, batch, items, plan, lr_scale, *more)
        every, rates = zip(*self._every(inputs), strict=True)
        return _step, (states, every, rates, items, more, program, plan, self.partitioner)

    def _every(self, values: Mapping[int, Any]) -> tuple[Any, ...]:
        first = next(iter(values.values()))
        return tuple(values.get(number, first) for number in range(self.number))


def _joined(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _taken(states: TrainState, number: jax.Array) -> TrainState:
    return jax.tree.map(lambda x: x[number], states)


@programs.program(calls="many", static_argnames=("step", "plan", "partitioner"), donate_argnums=0)
def _step(states, batches, rates, items, more, step, plan, partitioner):
    """Take a step of every run, `step(state, batch, items, plan, lr_scale, *more)` under `vmap`, on its device."""

    def one(items, state, batch, lr_scale, more):
        return step(state, batch, items, plan, lr_scale, *more)

    run = partitioner.shard_users(jax.vmap(one, in_axes=(None, 0, 0, 0, 0)))
    return run(items, states, _joined(batches), _joined(rates), more)
