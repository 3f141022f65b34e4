"""A finished run as a policy, and its feedback model as an environment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmrf_jax as mmrf
from mmrf_jax.envs import learned
from mmrf_jax.training import simulated_tests

KEY, B = jax.random.key(0), 16


@pytest.fixture(scope="module")
def run(finished):
    return mmrf.load(finished)


def test_the_policy_earns_what_it_earned_in_the_a_b_test(run):
    """The same key, users and day as in the run's own A/B test."""
    world = run.config["world"]
    env = mmrf.make(
        "short-video",
        num_videos=world["num_videos"],
        num_candidates=world["candidates"],
        slate_size=world["slate"],
        history_size=world["history"],
        max_requests=world["max_requests"],
        seed=world["seed"],
    )
    test = run.config["ab_test"]
    key = simulated_tests.ab_key(run.config["seed"])
    metrics = mmrf.rollout(env, run.policy, num_users=test["sessions"], key=key, day=test["day"])
    expected = run.results["ab_test"]["mmrf"]
    for name in ("watch_time", "depth"):
        assert metrics[name].mean() == pytest.approx(expected[name]["mean"], rel=1e-3)


@pytest.mark.slow
def test_the_feedback_model_is_an_environment(run):
    env = mmrf.make("learned", run=run)
    params, slate = env.default_params, jnp.tile(jnp.arange(env.slate_size), (B, 1))
    obs, state = env.reset(KEY, params, jnp.arange(B))
    np.testing.assert_array_equal(obs.candidates, state.request.candidates)
    hidden = state.hidden
    obs, state, reward, *_, info = env.step(KEY, state, slate, params)
    result, _ = jax.jit(learned.step)(KEY, hidden, slate, params)
    np.testing.assert_allclose(info["feedback"], result.exposure.feedback, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(reward, result.exposure.feedback[..., -1].sum(axis=1), rtol=1e-4)
    jax.tree.map(lambda spec, x: spec.contains(x) or pytest.fail(f"{x} is not in {spec}"), env.observation_spec, obs)
    metrics = mmrf.rollout(env, run.policy, num_users=B, key=KEY)
    assert (metrics["watch_time"] > 0).all() and set(env.reference_policies) == {"logged", "random"}


def test_artefacts_have_no_environment(artifact):
    with pytest.raises(ValueError, match="is an artefact, which has no checkpoint; name the run folder"):
        mmrf.make("learned", run=artifact)
