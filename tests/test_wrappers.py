"""Gymnasium's interfaces, by its own checker and against the environment that they wrap."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmrf_jax as mmrf

T, N = 4, 8


@pytest.fixture(scope="module")
def env():
    return mmrf.make("short-video", num_videos=3000, num_candidates=20, slate_size=3, history_size=8, max_requests=T)


@pytest.fixture(scope="module")
def single(env):
    pytest.importorskip("gymnasium")
    return mmrf.wrappers.GymnasiumEnv(env, seed=0)


@pytest.fixture(scope="module")
def vector(env):
    pytest.importorskip("gymnasium")
    return mmrf.wrappers.GymnasiumVectorEnv(env, num_envs=N)


def test_gymnasium_s_checker(single):
    import gymnasium
    from gymnasium.utils import env_checker

    assert isinstance(single, gymnasium.Env)
    env_checker.check_env(single)


def test_a_session_is_the_environment_s(env, single):
    obs, info = single.reset(seed=5, options={"user_id": 77})
    again, _ = single.reset(seed=5, options={"user_id": 77})
    jax.tree.map(np.testing.assert_array_equal, obs, again)
    other, _ = single.reset()
    assert (other["profile"] != obs["profile"]).any()
    obs, info = single.reset(seed=5, options={"user_id": 77})
    assert info == {"user_id": 77}
    inner, state = env.reset(single._key, env.default_params, jnp.array([77]))
    step, over = env.step, False
    while not over:
        np.testing.assert_array_equal(obs["candidates"], inner.candidates[0])
        np.testing.assert_allclose(obs["history_feedback"], inner.history.feedback[0], rtol=1e-4)
        obs, reward, terminated, truncated, info = single.step(np.array([4, 9, 1]))
        inner, state, expected, *flags, about = step(single._key, state, jnp.array([[4, 9, 1]]), env.default_params)
        assert reward == pytest.approx(float(expected[0]), rel=1e-4) and [terminated, truncated] == [
            bool(x[0]) for x in flags
        ]
        np.testing.assert_allclose(info["feedback"], about["feedback"][0], rtol=1e-4)
        over = terminated or truncated


def test_a_vector_resets_at_the_next_step(env, vector):
    import gymnasium

    assert isinstance(vector, gymnasium.vector.VectorEnv)
    assert vector.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.NEXT_STEP
    first, about = vector.reset(seed=1)
    again, _ = vector.reset(seed=1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    users, over, ended = about["user_id"], np.zeros(N, bool), 0
    fresh = env.reset
    for _ in range(2 * T):
        obs, reward, terminated, truncated, info = vector.step(np.tile(np.arange(3), (N, 1)))
        assert obs in vector.observation_space
        assert (reward[over] == 0).all() and (reward[~over] > 0).all()
        assert not (terminated | truncated)[over].any()
        np.testing.assert_array_equal(info["user_id"] != users, over)
        expected, _ = fresh(vector._key, env.default_params, jnp.asarray(info["user_id"]))
        np.testing.assert_array_equal(obs["candidates"][over], expected.candidates[over])
        np.testing.assert_array_equal(obs["exposure_mask"].any(axis=1), ~over)
        users, over = info["user_id"], terminated | truncated
        ended += over.sum()
    assert len(set(users)) == N and ended >= N


def test_a_vector_of_none(env):
    pytest.importorskip("gymnasium")
    with pytest.raises(ValueError, match="num_envs is 0; use 1 or more"):
        mmrf.wrappers.GymnasiumVectorEnv(env, num_envs=0)


@pytest.mark.parametrize("wrap", ["GymnasiumEnv", "GymnasiumVectorEnv"])
def test_a_name_is_no_environment(wrap):
    pytest.importorskip("gymnasium")
    with pytest.raises(ValueError, match="env is of type str; give an environment of"):
        getattr(mmrf.wrappers, wrap)("short-video", 2)


def test_without_gymnasium_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "mmrf_jax.envs.gymnasium_envs", raising=False)
    with pytest.raises(
        ModuleNotFoundError, match=r"^mmrf_jax.wrappers.GymnasiumEnv needs gymnasium; pip install mmrf_jax\[gym\]$"
    ):
        _ = mmrf.wrappers.GymnasiumEnv
    with pytest.raises(AttributeError, match="no attribute 'Gym'; it has GymnasiumEnv"):
        _ = mmrf.wrappers.Gym
