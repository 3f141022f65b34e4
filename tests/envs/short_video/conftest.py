"""A small world, and beliefs that know its users."""

import jax.numpy as jnp
import pytest

from mmrf_jax.envs.short_video import env, observable, parameters


@pytest.fixture(scope="module")
def small_world():
    return env.make_world(parameters.WorldConfig(num_videos=3_000, candidates=20, slate=3, history=4))


@pytest.fixture(scope="session")
def sure_of():
    """sure_of(state, variance): the belief about the users of a world's state that knows them up to a variance."""

    def belief(state, variance: float) -> observable.Belief:
        t, size = state.traits, len(state.user_id)
        rest = jnp.stack([t.activity, t.susceptibility, t.sociability, t.patience], axis=-1)
        cov = jnp.broadcast_to(variance * jnp.eye(observable.STATE), (size, observable.STATE, observable.STATE))
        mean = jnp.concatenate([state.interest, rest], axis=-1)
        return observable.Belief(mean, cov, state.satiation, jnp.zeros(size))

    return belief
