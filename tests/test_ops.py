"""The exposure operator against root-finding and brute force in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit, logsumexp

from mmrf_jax import ops
from mmrf_jax.agents.mmrf import losses

relaxed, log_prob, entropy = map(jax.jit, (ops.relaxed_top_k, ops.plackett_luce_log_prob, ops.entropy))
top_k = jax.jit(ops.top_k, static_argnums=1)


def relaxed_top_k(scores, k, temperature):
    """The definition, by root finding in float64, for one row of scores."""

    def excess(nu):
        return expit((scores - nu) / temperature).sum() - k

    spread = 50.0 * temperature + 1.0
    return expit((scores - brentq(excess, scores.min() - spread, scores.max() + spread, xtol=1e-13)) / temperature)


def objective(w, scores, temperature):
    w = np.clip(w, 1e-300, 1 - 1e-16)
    return np.sum(w * scores) - temperature * np.sum(w * np.log(w) + (1 - w) * np.log1p(-w))


def test_a_weight_is_so_many_equal_candidates():
    """Exposure, entropy, objective, and their gradients."""
    rng = np.random.default_rng(0)
    scores, q = (rng.normal(size=(4, 5)).astype(np.float32) for _ in range(2))
    many = np.array([1, 3, 2, 1, 4])
    weight = np.broadcast_to(many, scores.shape).astype(np.float32)

    def repeated(x):
        return np.repeat(x, many, axis=-1)

    group = np.repeat(np.arange(5), many)

    def joined(x):
        return np.stack([x[:, group == i].sum(axis=-1) for i in range(5)], axis=-1)

    w, each = ops.relaxed_top_k(scores, 3, 0.7, weight), ops.relaxed_top_k(repeated(scores), 3, 0.7)
    np.testing.assert_allclose(w, joined(np.asarray(each)), atol=1e-4)
    np.testing.assert_allclose(np.sum(w, axis=-1), 3.0, atol=1e-3)
    np.testing.assert_allclose(ops.entropy(w, weight), ops.entropy(each), rtol=1e-4)

    def value(a, b, c):
        return losses.policy_objective(a, b, 3, 0.5, c).sum()

    one, grad = jax.value_and_grad(value)(jnp.asarray(scores), q, weight)
    two, grads = jax.value_and_grad(value)(jnp.asarray(repeated(scores)), repeated(q), None)
    assert float(one) == pytest.approx(float(two), rel=1e-5)
    np.testing.assert_allclose(grad, joined(np.asarray(grads)), atol=1e-4)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 5.0])
@pytest.mark.parametrize(("c", "k"), [(12, 4), (5, 4), (7, 1), (100, 6)])
def test_relaxed_top_k_is_its_definition_and_sums_to_k(c, k, temperature):
    scores = np.random.default_rng(c + k).normal(size=(3, 2, c)).astype(np.float32)
    w = np.asarray(relaxed(scores, k, temperature))
    assert w.shape == scores.shape and (w >= 0).all() and (w <= 1).all()
    np.testing.assert_allclose(w.sum(-1), k, atol=1e-3)
    expected = np.apply_along_axis(relaxed_top_k, -1, scores.astype(np.float64), k, temperature)
    np.testing.assert_allclose(w, expected, atol=2e-4)


def test_relaxed_top_k_tends_to_the_hard_one():
    scores = np.random.default_rng(0).permutation(20).astype(np.float32)
    w = relaxed(scores, 6, 0.01)
    np.testing.assert_allclose(w, scores >= 14, atol=1e-6)
    assert set(np.flatnonzero(np.asarray(w) > 0.5)) == set(np.asarray(top_k(scores, 6)))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
@pytest.mark.parametrize(("c", "k"), [(8, 3), (4, 3)])
def test_relaxed_top_k_gradient_equals_finite_differences(c, k, temperature):
    scores = np.random.default_rng(1).normal(size=c)
    eps = 1e-5
    columns = [
        (relaxed_top_k(scores + eps * e, k, temperature) - relaxed_top_k(scores - eps * e, k, temperature)) / (2 * eps)
        for e in np.eye(c)
    ]
    got = jax.jit(jax.jacobian(lambda a: relaxed(a, k, temperature)))(jnp.asarray(scores, jnp.float32))
    np.testing.assert_allclose(got, np.stack(columns, axis=1), atol=5e-4 / temperature)
    np.testing.assert_allclose(np.asarray(got).sum(axis=0), 0.0, atol=1e-5)  # the sum stays K


def test_relaxed_top_k_maximises_value_plus_entropy():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=9)
    for temperature in (0.1, 1.0):
        w = np.asarray(relaxed(scores.astype(np.float32), 3, temperature), np.float64)
        best = objective(w, scores, temperature)
        for scale in (1e-3, 1e-2, 0.1, 1.0):
            for _ in range(200):
                other = rng.random(9) * 3 / 4.5  # another exposure of size 3
                other = np.clip(other, 0, 1)
                other *= w.sum() / other.sum()
                other = w + scale * (other - w)
                if (other >= 0).all() and (other <= 1).all():
                    assert objective(other, scores, temperature) <= best + 1e-6
        hard = np.zeros(9)
        hard[np.argsort(-scores)[:3]] = 1.0
        assert objective(hard, scores, temperature) < best


@pytest.mark.parametrize("k", [1, 3, 7])
def test_extreme_scores_stay_finite(k):
    rng = np.random.default_rng(3)
    scores = np.stack([rng.uniform(-1e4, 1e4, 8), np.where(np.arange(8) < 4, 1e4, -1e4), np.full(8, 1e4), np.zeros(8)])
    scores = scores.astype(np.float32)
    w = np.asarray(relaxed(scores, k, 1.0))
    assert np.isfinite(w).all()
    np.testing.assert_allclose(w.sum(-1), k, atol=0.05)
    np.testing.assert_allclose(w[2:], k / 8, atol=1e-3)
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(relaxed(a, k, 1.0)))))(scores)
    assert np.isfinite(gradient).all()


def test_top_k_breaks_ties_by_position_and_repeats_nothing():
    assert top_k(jnp.array([1.0, 3.0, 3.0, 0.0, 3.0]), 3).tolist() == [1, 2, 4]
    assert top_k(jnp.zeros((2, 5)), 4).tolist() == [[0, 1, 2, 3]] * 2
    scores = np.random.default_rng(4).integers(0, 4, (200, 12)).astype(np.float32)
    slate = np.asarray(top_k(scores, 6))
    assert all(len(set(row)) == 6 for row in slate)
    picked = np.take_along_axis(scores, slate, axis=-1)
    np.testing.assert_array_equal(picked, -np.sort(-scores, axis=-1)[:, :6])  # best first


@pytest.mark.parametrize(("c", "k"), [(3, 2), (5, 3), (4, 4), (4, 1)])
def test_plackett_luce_over_all_ordered_slates(c, k):
    scores = np.random.default_rng(5).normal(size=c) * 1.5
    slates = np.array(list(itertools.permutations(range(c), k)))
    got = log_prob(jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (len(slates), c)), slates)
    for slate, row in zip(slates, np.asarray(got), strict=True):
        left = list(range(c))
        for video, found in zip(slate, row, strict=True):
            assert found == pytest.approx(scores[video] - logsumexp(scores[left]), abs=1e-5)
            left.remove(video)
    assert np.exp(np.asarray(got, np.float64).sum(-1)).sum() == pytest.approx(1.0, abs=1e-5)


def test_plackett_luce_leaves_masked_slots_out():
    scores = jnp.asarray(np.random.default_rng(6).normal(size=(1, 6)), jnp.float32)
    full = log_prob(scores, jnp.array([[4, 2]]))
    # A padded slot points at position 0, which is not taken by it.
    padded = log_prob(scores, jnp.array([[4, 0, 2]]), jnp.array([[True, False, True]]))
    np.testing.assert_allclose(padded, [[full[0, 0], 0.0, full[0, 1]]], atol=1e-6)
    shown = log_prob(scores, jnp.array([[4, 0, 2]]))
    assert abs(float(shown[0, 2] - padded[0, 2])) > 1e-3
    nothing = log_prob(scores, jnp.zeros((1, 3), int), jnp.zeros((1, 3), bool))
    np.testing.assert_array_equal(nothing, 0.0)


@pytest.mark.parametrize("spread", [3.0, 10.0, 30.0, 1e4])
def test_plackett_luce_with_scores_far_apart(spread):
    """Subtracting the weight of what is taken from the total would lose all that is left."""
    scores = np.float64(np.float32(spread * np.array([1.0, 0.5, 0.1, 0.0, -0.2, -1.0])))
    slates = np.array([[0, 1, 2], [0, 1, 5], [5, 4, 0], [2, 0, 1]])
    got = np.asarray(log_prob(np.tile(np.float32(scores), (4, 1)), slates))
    for slate, row in zip(slates, got, strict=True):
        left = list(range(6))
        for video, found in zip(slate, row, strict=True):
            assert found == pytest.approx(scores[video] - logsumexp(scores[left]), rel=1e-5, abs=1e-4)
            left.remove(video)


def test_entropy_by_hand():
    np.testing.assert_allclose(entropy(jnp.full((2, 4), 0.5)), 4 * np.log(2.0), rtol=1e-6)
    w = np.array([0.2, 0.9])
    expected = -(0.2 * np.log(0.2) + 0.8 * np.log(0.8) + 0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    np.testing.assert_allclose(entropy(jnp.asarray(w, jnp.float32)), expected, rtol=1e-5)
    np.testing.assert_allclose(entropy(jnp.array([0.0, 1.0])), 0.0, atol=1e-4)
