"""The filter of what a platform can observe: against the world where it knows all, and against brute force."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax import types
from mmrf_jax.envs.short_video import env, observable, parameters, reference_policies, response, users
from mmrf_jax.signals import SHORT_VIDEO

B, L = 8, parameters.LATENT


def test_a_belief_that_knows_all_ranks_as_the_planning_oracle_and_follows_the_session(small_world, sure_of):
    @jax.jit
    def arrive(params):
        _, _, state = env.reset(jax.random.key(0), params, jnp.arange(B), jnp.int32(0))
        return sure_of(state, 1e-8), state

    @jax.jit
    def turn(params, key, belief, state):
        scores = observable.scores(params, belief, state.candidates), reference_policies.oracle_planning(params, state)
        result, state = env.step(key, state, jnp.tile(jnp.arange(3), (B, 1)), params)
        return scores, observable.observe(params, belief, result.exposure), state

    belief, state = arrive(small_world.default_params)
    for step in range(3):
        (found, expected), belief, state = turn(small_world.default_params, jax.random.key(step), belief, state)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=0.02)
    np.testing.assert_allclose(belief.mean[:, :L], state.interest, atol=1e-4)
    np.testing.assert_allclose(belief.satiation, state.satiation, atol=1e-6)


likelihood_of = jax.jit(observable.watch_log_likelihood)


@pytest.mark.parametrize("duration", [6.0, 40.0])
def test_play_times_have_the_likelihood_of_the_response(duration):
    """It integrates to 1 over densities and atoms, and its mean is that of `response.expected_feedback`."""
    b, engagement = parameters.Behaviour(), np.linspace(-3.0, 4.0, 5, dtype=np.float32)

    def density(seconds):
        return np.exp(likelihood_of(b, engagement[:, None], np.atleast_1d(seconds)[None], np.float32(duration)))

    total, mean = np.zeros(5), np.zeros(5)
    for low, high in (
        (-3.0, -1e-5),
        (1e-5, np.log(duration) - 2e-4),
        (np.log(duration) + 2e-4, np.log(2 * duration) - 2e-4),
    ):
        edges = np.linspace(low, high, 4_001)
        middle = np.exp(0.5 * (edges[1:] + edges[:-1])).astype(np.float32)
        mass = density(middle) * np.diff(edges)
        total, mean = total + mass.sum(axis=1), mean + mass @ middle
    for atom in (1.0, duration, 2 * duration):
        mass = density(np.float32(atom))[:, 0]
        total, mean = total + mass, mean + atom * mass
    np.testing.assert_allclose(total, 1.0, atol=2e-3)
    zero = np.zeros(5, np.float32)
    truth = response.Affinity(zero, engagement, zero, np.full(5, duration, np.float32), zero, zero)
    truth = jax.tree.map(lambda x: x[:, None], truth)

    @jax.jit
    def expect(truth):
        return response.expected_feedback(SimpleNamespace(behaviour=b), SimpleNamespace(sociability=zero), truth)[0]

    expected = expect(truth)
    np.testing.assert_allclose(mean, expected[:, 0, -1], rtol=0.005)


def test_beliefs_are_those_of_brute_force(small_world):
    """Posterior of a user with a noisy profile and four exposures, by weighing 200,000 users drawn from the world."""
    number, params = 200_000, small_world.default_params
    params = params.replace(behaviour=dataclasses.replace(params.behaviour, retrieval_noise=2.0, profile_noise=2.0))
    traits, interest = jax.jit(users.draw)(jnp.arange(number), params)
    mine = jax.tree.map(lambda x: x[:1], traits)
    videos = jnp.array([[5, 900, 1700, 2500]])
    feedback = np.zeros((1, 4, len(SHORT_VIDEO)), np.float32)
    feedback[0, :, -1] = [3.0, 40.0, 8.0, 1.7]
    feedback[0, 1:3, SHORT_VIDEO.index("click")] = feedback[0, 1, SHORT_VIDEO.index("like")] = 1.0
    history = types.Exposure(videos=videos, feedback=jnp.asarray(feedback), mask=jnp.ones((1, 4), bool))
    belief = jax.jit(observable.start)(params, mine.profile, history)

    # Weights: of the view's direction by integrating over its length, of the habits, and of the feedback.
    cosine = np.asarray(interest @ mine.retrieval[0], np.float64)
    s, var = np.linspace(0.01, 12.0, 1_000), 0.5**2
    grid = np.linspace(-1.0, 1.0, 401)
    integral = (s ** (L - 1) * np.exp(-(s**2 - 2.0 * s * grid[:, None]) / (2.0 * var))).sum(axis=1)
    log_weight = np.interp(cosine, grid, np.log(integral))
    habits = np.stack([traits.activity, traits.patience, np.log(traits.susceptibility) / 0.3, traits.sociability], -1)
    log_weight -= ((np.asarray(mine.profile[0, L:]) - habits) ** 2).sum(axis=1) / (2.0 * 2.0**2)

    @jax.jit
    def likelihood(params, traits, interest):
        b, shown = params.behaviour, jnp.broadcast_to(videos, (number, 4))
        truth = response.affinity(params, traits, interest, jnp.zeros((number, parameters.TOPICS)), shown)
        seconds, click = feedback[..., -1], feedback[..., 0]
        total = observable.watch_log_likelihood(b, truth.engagement, seconds, truth.duration)
        for name in response.EXPLICIT:
            logit = response.explicit_logit(b, name, traits, truth, jnp.log1p(seconds), click)
            total += jax.nn.log_sigmoid(jnp.where(feedback[..., SHORT_VIDEO.index(name)] > 0, logit, -logit))
        return total.sum(axis=1)

    log_weight += np.asarray(likelihood(params, traits, interest), np.float64)
    log_weight[0] = -np.inf  # the user
    w = np.exp(log_weight - log_weight.max())
    w /= w.sum()
    assert 1.0 / (w**2).sum() > 400.0
    x = np.concatenate([interest, np.stack([traits.activity, traits.susceptibility, traits.sociability], -1)], axis=1)
    mean = w @ x
    spread = np.sqrt(w @ (x - mean) ** 2)
    size = observable.PATIENCE
    found, deviation = belief.mean[0, :size], np.sqrt(np.diagonal(belief.cov[0]))[:size]
    assert np.abs((found - mean) / spread).max() < 0.2, (found - mean) / spread
    np.testing.assert_allclose(deviation, spread, rtol=0.15)
    prior_mean = observable.prior(params, mine.profile)[0][0, :size]  # the feedback has moved the belief
    assert np.abs((prior_mean - mean) / spread).max() > 0.4
