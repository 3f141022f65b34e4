"""The main functions lower for GPUs and TPUs, and come back from the bytes; compiling there is not tried."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import export

from mmrf_jax.agents.mmrf import policy
from mmrf_jax.envs import rollout
from mmrf_jax.envs.short_video import env, parameters
from mmrf_jax.training import steps
from mmrf_jax.training.train_state import TrainState

PLATFORMS = ("cpu", "cuda", "tpu")
PLAN = steps.TrainConfig("mmrf", tiny.CONFIG, tiny.FEEDBACK, rounds=1, closed_loop=True, slates=1)


def is_key(x) -> bool:
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def flat(fn, *trees):
    """`fn` of plain arrays, and these: typed keys by their numbers, which is what an artefact holds."""
    leaves, tree = jax.tree.flatten(trees)
    keys = [is_key(x) for x in leaves]

    def run(*raw):
        back = [jax.random.wrap_key_data(x) if key else x for x, key in zip(raw, keys, strict=True)]
        out = jax.tree.leaves(fn(*jax.tree.unflatten(tree, back)))
        return [jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in out]

    return run, [np.asarray(jax.random.key_data(x)) if key else x for x, key in zip(leaves, keys, strict=True)]


def run_state() -> TrainState:
    agents, zero = tiny.make_state(), jnp.zeros((), jnp.int32)
    behavior_params = {"params": agents.params, "tables": agents.tables}
    return TrainState(agents, tiny.make_feedback_model(), behavior_params, zero, zero, jnp.zeros((2,), jnp.int32))


def fit():
    def step(state, batch, items):
        return steps.fit_step.__wrapped__(state, batch, items, PLAN, 1.0)

    return step, (run_state(), tiny.make_batch(), tiny.make_items())


def update():
    def step(state, batch, items):
        return steps.update_step.__wrapped__(state, batch, items, PLAN, 1.0)

    return step, (run_state(), tiny.make_batch(), tiny.make_items())


def serve():
    """Sessions of the world, served by the agents."""
    sim = env.make_world(parameters.WorldConfig(num_videos=3000, candidates=8, slate=3, history=4))
    spec = dataclasses.replace(
        tiny.SPEC,
        num_videos=3000,
        num_authors=sim.items.num_authors,
        num_tags=sim.items.num_tags,
        num_users=0,
        item_features=sim.items.features.shape[1],
        profile=parameters.PROFILE,
        context=parameters.CONTEXT,
    )
    ranker = policy.make_actor_ranker(tiny.make_state(spec=spec), sim.items, tiny.CONFIG)

    def run(sim, weights, key):
        return rollout.rollout(sim, ranker.replace(params=weights), key, 0, 0, num_users=20, slots=8)

    return run, (sim, ranker.params, jax.random.key(0))


SLOW = [pytest.param(function, marks=pytest.mark.slow) for function in (update, serve)]


@pytest.mark.parametrize("function", [fit, *SLOW])
def test_lowered_for_every_platform_and_read_back(function):
    fn, arguments = function()
    run, arrays = flat(fn, *arguments)
    lowered = export.export(jax.jit(run), platforms=PLATFORMS)(*arrays)
    again = export.deserialize(lowered.serialize())
    assert set(again.platforms) == set(PLATFORMS)
    assert [x.shape for x in again.out_avals] == [x.shape for x in lowered.out_avals]
    for found, wanted in zip(again.call(*arrays), jax.jit(run)(*arrays), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
