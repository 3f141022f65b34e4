"""What a run compiles while its first log is collected."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax import types
from mmrf_jax.encoders import encoder
from mmrf_jax.evaluation import offline
from mmrf_jax.parallel import mesh as par
from mmrf_jax.parallel import programs
from mmrf_jax.simulators import base
from mmrf_jax.simulators.feedback import fitting
from mmrf_jax.training import alternation, arms, batches, judging, predicted, runs, sources


def initial(shapes: alternation.RunState) -> programs.Program:
    """The program of a fresh state: `alternation.init`, each array made where it lives."""
    shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
    return programs.Program(alternation.init, often=False, static_argnames=("plan", "schema"), out_shardings=shardings)


def initial_args(config, plan: alternation.Plan, source: sources.Source, known) -> tuple:
    """Arguments of `initial`, from what is known of the first log (`batches.known`)."""
    floats = (np.asarray(x, np.float32) for x in known)
    return types.make_key(config.seed), plan, source.schema, source.items, *floats


def begin(
    ahead: programs.Ahead,
    config,
    plan: alternation.Plan,
    source: sources.Source,
    shapes: alternation.RunState,
    start: programs.Program | None,
    policies: dict[str, base.Policy],
    mesh,
) -> None:
    """Begins to compile the programs of a run in the order of their first calls.

    Args:
      shapes: of the state, with shardings. start: `initial` of them; None where the state is there already.
      policies: arms of the A/B test beside the run's own.
    """
    if jax.process_count() > 1:
        return  # processes would compile in orders of their own
    items, schema, segment = source.items, source.schema, config.train.segment
    part = lambda name: par.put_batch(batches.example(schema, config[name].batch, segment), mesh)
    rate = np.float32(1.0)
    if start is not None:
        known = (np.ones(len(types.SIGNALS)),) * 3
        ahead.add("initial state", lambda: start.lower(*initial_args(config, plan, source, known)))
    encodings = None
    if plan.models:
        ahead.add("fit", lambda: alternation.fit_step.lower(shapes, part("feedback"), items, plan, rate))
        ahead.add("measure", lambda: fitting._measure.lower(shapes.feedback, part("feedback"), items, plan.feedback))
        if alternation.keeps_encodings(plan, items):
            size = (2, items.num_videos, encoder.sizes(plan.feedback, schema)[1])
            encodings = jax.ShapeDtypeStruct(size, jnp.float32, sharding=par.replicated(mesh))
    ahead.add("train", lambda: alternation.update_step.lower(shapes, part("train"), items, plan, rate, encodings))
    if source.sim is not None:
        policy = base.choices({**policies, config.method: runs.untrained_policy(config, mesh, source)})[config.method]
        world, capacity = source.sim._replace(items=items), arms.block_users(config.ab_test.sessions, mesh)
        key = judging.ab_key(config.seed)
        ahead.add("A/B test", lambda: arms.lower(world, policy, key, mesh, k=schema.slate, capacity=capacity))
    batch = batches.example(schema, offline.BATCH, segment)
    ahead.add("offline", lambda: predicted.evaluate.lower(shapes, batch, items, plan))
