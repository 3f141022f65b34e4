"""Objects built from a config or a run folder: the source of sessions, and the trained state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax import types
from mmrf_jax.agents import registry
from mmrf_jax.checkpointing import manager
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.envs import rankers
from mmrf_jax.io import files
from mmrf_jax.io.progress import Counter, counted, say
from mmrf_jax.parallel import multihost
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import (
    configs,
    inputs,
    log_source,
    run_folder,
    simulated_tests,
    simulator_source,
    sources,
    steps,
    train_state,
)
from mmrf_jax.training.train_state import TrainState
from mmrf_jax.training.trained_run import TrainedRun

#: Progress of a log's collection, in which each process collects its own part.
counted_in_parts = functools.partial(counted, checks=32)


def state_shapes(config: configs.Run, source: sources.Source | inputs.Inputs, partitioner: Partitioner) -> TrainState:
    """Return the shapes, types and shardings of a state, as a restore target; computes nothing."""
    return train_state.infer_shardings(_shapes(config, source), partitioner)


def _shapes(config: configs.Run, source: sources.Source | inputs.Inputs) -> TrainState:
    """Return the shapes and types of a state."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: source.items))
    return _state_shapes(steps.plan_of(config, source.spec.signals), source.spec, tree, tuple(leaves))


@functools.lru_cache(maxsize=1)
def _state_shapes(plan: steps.TrainConfig, spec: InputSpec, tree, leaves: tuple) -> TrainState:
    ones = jnp.ones(len(spec.signals))

    def init(items):
        return steps.init_train_state(types.make_key(0), plan, spec, items, ones, ones, ones)

    return jax.eval_shape(init, jax.tree.unflatten(tree, leaves))


def load_state(
    config: configs.Run, source: sources.Source | inputs.Inputs, workdir: Path, partitioner: Partitioner
) -> TrainState:
    """Load the latest state of a run.

    Raises:
      ValueError: if the run has no checkpoint yet.
      CheckpointError: if all checkpoints are damaged.
    """
    nothing = ValueError(f"{workdir} has no checkpoint; train it first: mmrf train --workdir={workdir}")
    if not (workdir / "checkpoints").exists():
        raise nothing
    with manager.Checkpoints(workdir / "checkpoints", read_only=True, agree=multihost.on_primary) as checkpoints:
        if checkpoints.latest_step() is None:
            raise nothing
        state, step = checkpoints.restore(state_shapes(config, source, partitioner))
    done = workdir / "learned.json"
    if not done.exists() or run_folder.read_json(done)["steps"] != step:
        say(f"{workdir} has not learned to its end: this is step {step}")
    return state


def load_run(config: configs.Run, workdir: Path) -> TrainedRun:
    """Return a run with its latest state and its source, which may take long to open; see `load_state` for errors."""
    partitioner = Partitioner()
    source = source_of(config, partitioner, workdir=workdir)
    plan = steps.plan_of(config, source.spec.signals)
    return TrainedRun(source, plan, load_state(config, source, workdir, partitioner), partitioner)


def load_trained(config: configs.Run, workdir: Path, partitioner: Partitioner) -> tuple[inputs.Inputs, TrainState]:
    """Return the inputs and the latest state of a run; see `inputs.read_inputs` and `load_state` for errors."""
    found = inputs.read_inputs(workdir)
    return found, load_state(config, found, workdir, partitioner)


def open_source(
    config: configs.Run,
    progress: Counter,
    own: Callable[[sources.Source], rankers.AnyRanker] | None = None,
    workdir: Path | None = None,
) -> sources.Source:
    """Return the source that `config.source` names, with its items on this process's default device.

    Args:
      progress: as `io.progress.counted`.
      own: gives a policy with the shapes of the one that will collect the run's logs; see `Source.choose`.
      workdir: the run folder, which holds the log of a run on `logs`.
    """
    if config.source == "world":
        return simulator_source.of_world(config, progress, own)
    if config.source == "kuairand":
        return log_source.of_kuairand(config)
    if config.source == "logs":
        return log_source.of_own_log(config, workdir)
    raise ValueError(f"unknown source {config.source!r}; use --config.source=world, kuairand or logs")


def source_of(
    config: configs.Run,
    partitioner: Partitioner,
    closed_loop: bool = False,
    workdir: Path | None = None,
    like: sources.Source | None = None,
) -> sources.Source:
    """Return a config's source with its items on the devices; `simulator=feedback` uses another run's feedback model.

    Args:
      closed_loop: whether the run's own policy will collect logs too (see `sources.Source.choose`).
      workdir: the run folder, which holds the log of a run on `logs`; if None, the log is that of the feedback model.
      like: the source of a config that differs in its seed alone, whose world or logs are shared.

    Raises:
      ValueError: if that run has another source, or no feedback model.
    """
    if config.simulator == "feedback" and config.simulator_checkpoint and config.source == "logs" and workdir is None:
        workdir = files.user_path(config.simulator_checkpoint, "config.simulator_checkpoint")
        config = dataclasses.replace(config, data=configs.run_of(run_folder.read_config(workdir)).data)
    own = functools.partial(untrained_policy, config) if closed_loop else None
    if like is None or config.simulator == "feedback":
        source = open_source(config, counted_in_parts, own, workdir)
        source = dataclasses.replace(source, items=partitioner.replicate(source.items))
    elif like.sim is None:
        source = dataclasses.replace(like, config=config)
    else:
        source = simulator_source.of_world(config, counted_in_parts, own, like.sim)
        source = dataclasses.replace(source, items=like.items)
    if config.simulator == "world":
        return source
    if config.simulator != "feedback":
        raise ValueError(f"unknown simulator {config.simulator!r}; use --config.simulator=world or feedback")
    if not config.simulator_checkpoint:
        raise ValueError("config.simulator=feedback needs a model; use --config.simulator_checkpoint=RUN")
    path = files.user_path(config.simulator_checkpoint, "config.simulator_checkpoint")
    fitted = configs.run_of(run_folder.read_config(path))
    check_same_world(str(path), fitted, source)
    plan = steps.plan_of(fitted, source.spec.signals)
    if not plan.use_feedback_model:
        raise ValueError(
            f"run {path} has no feedback model: its method is {fitted.method}, its ablation {fitted.agents.ablation}; "
            "name another run"
        )
    state = load_state(fitted, source, path, partitioner)
    model = simulated_tests.feedback_simulator(source, plan, state, source.train(), answers=config.simulator_answers)
    return simulator_source.in_simulator(source, model, None, counted_in_parts, own)


def untrained_policy(config: configs.Run, source: sources.Source) -> rankers.AnyRanker:
    """Return a policy with the shapes of the run's own and all-zero parameters."""
    agents = steps.agent_config(config, source.spec.signals)
    make = functools.partial(registry.get(config.method).make_policy, config=agents)
    shapes = jax.eval_shape(lambda state: make(state, source.items), _shapes(config, source).agents)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def check_same_world(name: str, trained, source: sources.Source) -> None:
    """Refuse a run that was trained on another source or world."""
    if trained.source != source.config.source:
        raise ValueError(
            f"run {name} was trained on {trained.source}, it cannot act in {source.config.source}; name another run"
        )
    if trained.source == "world":
        here, there = simulator_source.world_origin(source.config), simulator_source.world_origin(trained)
        if differing := [n for n in there if there[n] != here.get(n)]:
            flags = " ".join(f"--config.world.{n}={there[n]}" for n in differing)
            raise ValueError(f"run {name} was trained in another world; add {flags}")
        unmarked = source.config.collect.random_share is None
        if unmarked != (trained.collect.random_share is None):
            fix = "use --config.collect.random_share=0" if unmarked else "leave --config.collect.random_share out"
            raise ValueError(f"run {name} differs from this one in whether requests say they are random; {fix}")
