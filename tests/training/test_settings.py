"""JAX's global settings: programs trace under all of them, with the dtypes and the random numbers of the defaults."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmrf_jax import random, types
from mmrf_jax.agents.mmrf import policy
from mmrf_jax.envs import rollout
from mmrf_jax.envs.short_video import env, parameters
from mmrf_jax.training import simulator_source, steps, train_state

SETTINGS = {
    "x64": functools.partial(jax.enable_x64, True),
    "rbg": functools.partial(jax.default_prng_impl, "rbg"),
    "strict promotion": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "no rank promotion": functools.partial(jax.numpy_rank_promotion, "raise"),
    "debug nans": functools.partial(jax.debug_nans, True),
}
PLAN = steps.TrainConfig("mmrf", tiny.CONFIG, tiny.FEEDBACK, rounds=1, closed_loop=True, slates=1)


@contextlib.contextmanager
def under(*names):
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(SETTINGS[name]())
        yield


def streams():
    """Random numbers of a step by both computations, and their transforms."""
    users = np.arange(5, dtype=np.int32)
    key = jax.random.fold_in(types.make_key(3), 7)
    fused, plain = (
        draw(key, np.int32(2), users, 6) for draw in (random.per_user_uniform, random.reference_per_user_uniform)
    )
    return [np.asarray(x) for x in (fused, plain, random.to_normal(plain), random.to_gumbel(plain))]


@pytest.mark.parametrize("name", SETTINGS)
def test_random_numbers_are_the_same_bits_under(name):
    expected = streams()
    np.testing.assert_array_equal(expected[0], expected[1])
    with under(name):
        for got, want in zip(streams(), expected, strict=True):
            assert got.dtype == want.dtype == np.float32
            np.testing.assert_array_equal(got, want)


def wide(tree) -> list[str]:
    """The leaves of 64 bits."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path) for path, x in leaves if np.dtype(getattr(x, "dtype", "i4")).itemsize == 8]


def numbers(tree):
    """The arrays of a tree but its keys."""
    arrays = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]

    def keyed(x):
        return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)

    return [x for x in arrays if not keyed(x)]


@pytest.mark.slow
def test_fit_and_update_under_all_settings_at_once():
    """Nothing of 64 bits, nothing that is only promoted by default; traced, not run."""
    items, batch = tiny.make_items(), tiny.make_batch()
    ones = np.ones(tiny.S, np.float32)
    with under(*SETTINGS):
        state = jax.eval_shape(
            lambda: steps.init_train_state(types.make_key(0), PLAN, tiny.SPEC, items, ones, ones, ones)
        )
        assert not wide(numbers(state))
        lr_scale = jnp.float32(1.0)
        fitted = jax.eval_shape(functools.partial(steps.fit_step, plan=PLAN), state, batch, items, lr_scale=lr_scale)
        assert not wide(numbers(fitted))
        encodings = jax.eval_shape(lambda state: steps.precompute_item_embeddings(state, items, PLAN), state)
        updated = jax.eval_shape(
            functools.partial(steps.update_step, plan=PLAN), state, batch, items, lr_scale=lr_scale, encodings=encodings
        )
        assert not wide(numbers(updated))
        assert not wide(numbers(jax.eval_shape(train_state.next_round, state)))


@pytest.mark.slow
def test_rollouts_under_all_settings_at_once():
    config = parameters.WorldConfig(num_videos=3000, candidates=8, slate=3, history=4, max_requests=6)
    sim = env.make_world(config)
    spec, ones = simulator_source.world_spec(sim, config), np.ones(tiny.S, np.float32)

    def serve(name: str):
        ranker = simulator_source.world_policies().get(name)
        if ranker is None:
            state = steps.init_train_state(types.make_key(0), PLAN, spec, sim.items, ones, ones, ones)
            ranker = policy.make_actor_ranker(state.agents, sim.items, PLAN.agents)
        zero = jnp.int32(0)
        return rollout.rollout(sim, ranker, types.make_key(0), zero, zero, num_users=4, slots=4)

    with under(*SETTINGS):
        for name in (*simulator_source.world_policies(), "agents"):
            sums, counts = jax.eval_shape(functools.partial(serve, name))
            assert (sums.dtype, counts.dtype) == (jnp.float32, jnp.int32)


@pytest.mark.slow
def test_the_world_is_the_same_bits_under_all_settings_at_once():
    """Its videos, users, histories, candidates and answers."""

    def look():
        config = parameters.WorldConfig(num_videos=1000, candidates=20, history=4)
        sim = env.make_world(config)
        key, users = types.make_key(0), np.arange(50, dtype=np.int32)
        request, history, state = jax.jit(sim.reset_env)(key, sim.default_params, users, np.int32(0))
        slate = np.tile(np.arange(6, dtype=np.int32), (50, 1))
        result, state = jax.jit(sim.step_env)(key, state, slate, sim.default_params)
        return [np.asarray(x) for x in numbers((sim.default_params, request, history, state, result))]

    expected = look()
    with under(*SETTINGS):
        for got, want in zip(look(), expected, strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)
