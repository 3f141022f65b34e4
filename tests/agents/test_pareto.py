"""Pareto: min-norm weights against SciPy and by hand, and a step along which no objective falls."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import scipy.optimize
import tiny

from mmrf_jax.agents import pareto
from mmrf_jax.agents.mmrf import losses, training_step

CONFIG = dataclasses.replace(
    tiny.CONFIG, one_actor=True, ablation="no_augmentation", optimizer="sgd", learning_rate=1e-3
)

min_norm_weights = jax.jit(pareto.min_norm_weights)


def test_min_norm_weights_by_hand():
    orthogonal = np.diag(np.float32([1.0, 4.0]))  # the nearest point of the segment weighs by inverse squared norms
    np.testing.assert_allclose(min_norm_weights(orthogonal), [0.8, 0.2], atol=1e-5)
    short, long = np.array([1.0, 0.0]), np.array([3.0, 1.0])  # the short one is the nearest point itself
    g = np.stack([short, long])
    np.testing.assert_allclose(min_norm_weights(g @ g.T), [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(min_norm_weights(np.ones((3, 3), np.float32)), np.full(3, 1 / 3), atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_min_norm_weights_against_scipy(seed):
    g = np.random.default_rng(seed).normal(size=(5, 7)) + 0.5
    gram = g @ g.T
    found = np.asarray(min_norm_weights(gram), np.float64)
    assert found.min() >= 0.0 and found.sum() == pytest.approx(1.0, abs=1e-5)
    best = scipy.optimize.minimize(
        lambda a: a @ gram @ a,
        np.full(5, 0.2),
        jac=lambda a: 2 * gram @ a,
        bounds=[(0, 1)] * 5,
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1.0},
        options={"ftol": 1e-12},
    )
    assert found @ gram @ found <= best.fun * 1.001 + 1e-9


def test_no_objective_falls():
    """The step of the actor is along the weighted gradient, whose product with each objective's is not negative."""
    items, batch, state = tiny.make_items(), tiny.make_batch(), tiny.make_state(CONFIG)

    def actor_loss(b, temperature):
        def objectives(scores):
            value = losses.policy_objective(scores, b.q / b.q_scale[:, None], CONFIG.slate, temperature)
            wanted = losses.optimal_scores(b.q, b.q_mean, b.q_scale, temperature)
            return b.mean(value - losses.PROJECTION_WEIGHT * losses.projection(scores, wanted))

        loss, metrics = pareto.actor_loss(b, temperature)
        return loss, metrics | {"jacobian": b.jacobian(objectives)}

    fn = functools.partial(training_step.update, config=CONFIG, algorithm=training_step.Algorithm(actor_loss))
    after, metrics = jax.jit(fn)(state, batch, items)
    leaves = jax.tree.leaves(metrics["jacobian"])
    rows = np.concatenate([np.asarray(g).reshape(CONFIG.num_agents, -1) for g in leaves], axis=1)
    moved = jax.tree.map(lambda a, b: a - b, *jax.device_get((after.params["actor"], state.params["actor"])))
    step = np.concatenate([x.reshape(-1) for x in jax.tree.leaves(moved)])
    assert np.linalg.norm(step) > 1e-6
    rise = rows @ step / (np.linalg.norm(rows, axis=1) * np.linalg.norm(step))
    assert rise.min() > -0.02
    weights = min_norm_weights(rows @ rows.T)
    np.testing.assert_allclose(step, CONFIG.learning_rate * np.asarray(weights) @ rows, rtol=2e-2, atol=1e-6)
