"""Ahead-of-time compilation of a run's programs while its first log is collected."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax import types
from mmrf_jax.abtest import simulate
from mmrf_jax.envs import rankers
from mmrf_jax.models import encoders
from mmrf_jax.models.feedback_model import fitting
from mmrf_jax.parallel import programs
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import (
    batches,
    configs,
    evaluate,
    predictions,
    restore,
    side_by_side,
    simulated_tests,
    sources,
    steps,
)
from mmrf_jax.training.train_state import TrainState


def init_program(partitioner: Partitioner, shapes: TrainState) -> programs.Program:
    """Return the program that initialises a state of these shapes, with their shardings: `steps.init_train_state`."""
    return partitioner.partition_init(steps.init_train_state, shapes, static_argnames=("plan", "spec"))


def init_args(config: configs.Run, plan: steps.TrainConfig, source: sources.Source, statistics) -> tuple:
    """Return the arguments of `init_program`, given the first log's statistics (`batches.feedback_statistics`)."""
    floats = (np.asarray(x, np.float32) for x in statistics)
    return types.make_key(config.seed), plan, source.spec, source.items, *floats


def compile_ahead(
    ahead: programs.Ahead,
    config: configs.Run,
    plan: steps.TrainConfig,
    source: sources.Source,
    seeds: side_by_side.Seeds,
    start: programs.Program | None,
    policies: dict[str, rankers.AnyRanker],
) -> None:
    """Start compiling the programs of a run in the order of their first calls.

    Args:
      source: of one of the runs.
      seeds: the runs that are trained side by side.
      start: `init_program` of the state's shapes; None if the states already exist.
      policies: arms of the A/B test in addition to the run's own.
    """
    if jax.process_count() > 1:
        return  # processes could compile in different orders
    compile_steps_ahead(ahead, config, plan, source, seeds, start)
    items, spec, segment, partitioner = source.items, source.spec, config.train.segment, seeds.partitioner
    if source.sim is not None:
        policy = rankers.choices({**policies, config.method: restore.untrained_policy(config, source)})[config.method]
        world, capacity = source.sim.with_items(items), simulate.block_users(config.ab_test.sessions, partitioner)
        key = simulated_tests.ab_key(config.seed)
        ahead.add("A/B test", lambda: simulate.lower(world, policy, key, partitioner, capacity=capacity))
    batch = partitioner.shard_inputs(batches.example_batch(spec, evaluate.scored_at_once(partitioner), segment))
    ahead.add("offline", lambda: predictions.score_and_predict.lower(seeds.shapes, batch, items, plan))


def compile_steps_ahead(
    ahead: programs.Ahead,
    config: configs.Run,
    plan: steps.TrainConfig,
    source: sources.Source,
    seeds: side_by_side.Seeds,
    start: programs.Program | None = None,
) -> None:
    """Start compiling the initialisation, if it is given, and the steps; arguments as in `compile_ahead`."""
    items, spec, segment, partitioner = source.items, source.spec, config.train.segment, seeds.partitioner

    def part(name):
        return partitioner.shard_inputs(batches.example_batch(spec, getattr(config, name).batch, segment))

    lr_scale = np.float32(1.0)
    if config.train.log_on_device:
        lr_scale = partitioner.replicate(lr_scale)  # as `on_device.DeviceBatches` gives it
    if start is not None:
        statistics = (np.ones(len(spec.signals)),) * 3
        ahead.add("initial state", lambda: start.lower(*init_args(config, plan, source, statistics)))
    encodings = None
    if plan.use_feedback_model:
        ahead.add("fit", lambda: seeds.lower(steps.fit_step, part("feedback"), lr_scale, items, plan))
        model = seeds.shapes.feedback
        ahead.add("measure", lambda: fitting._measure.lower(model, part("feedback"), items, plan.feedback))
        if steps.precomputes_item_embeddings(plan, items):
            size = (2, items.num_videos, encoders.sizes(plan.feedback, spec)[1])
            one = jax.ShapeDtypeStruct(size, jnp.float32, sharding=partitioner.replicated_sharding)
            encodings = seeds.shapes_of(one)
    ahead.add("train", lambda: seeds.lower(steps.update_step, part("train"), lr_scale, items, plan, encodings))
