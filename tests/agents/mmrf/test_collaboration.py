"""Attention between agents against its formula in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax.agents.mmrf.collaboration import Collaboration


@functools.partial(jax.jit, static_argnums=0)
def apply(heads, params, h):
    return Collaboration(heads).apply(params, h)


@functools.partial(jax.jit, static_argnums=0)
def init(heads, h):
    """(x, attention), params"""
    return Collaboration(heads).init_with_output(jax.random.key(1), h)


def reference(h, query, key, value, heads):
    """x_i = sum over j != i of alpha_ij W_v h_j, written out agent by agent and head by head."""
    n, dim = h.shape
    size = dim // heads
    x, attention = np.zeros((n, dim)), np.zeros((heads, n, n))
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(n):
            others = [j for j in range(n) if j != i]
            logits = np.array([(h[j] @ key)[part] @ (h[i] @ query)[part] for j in others]) / np.sqrt(size)
            alpha = np.exp(logits - logits.max())
            alpha /= alpha.sum()
            attention[head, i, others] = alpha
            x[i, part] = sum(a * (h[j] @ value)[part] for a, j in zip(alpha, others, strict=True))
    return x, attention


def given(dim, seed=0):
    rng = np.random.default_rng(seed)
    maps = {name: rng.normal(size=(dim, dim)) for name in ("query", "key", "value")}
    params = {"params": {name: {"kernel": jnp.asarray(m, jnp.float32)} for name, m in maps.items()}}
    return maps, params


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_equals_the_formula_for_three_agents(heads):
    maps, params = given(4)
    h = np.random.default_rng(1).normal(size=(5, 3, 4))
    x, attention = apply(heads, params, jnp.asarray(h, jnp.float32))
    assert x.shape == (5, 3, 4) and attention.shape == (5, heads, 3, 3)
    for b in range(5):
        expected_x, expected_attention = reference(h[b], **maps, heads=heads)
        np.testing.assert_allclose(x[b], expected_x, atol=1e-5)
        np.testing.assert_allclose(attention[b], expected_attention, atol=1e-5)


def test_by_hand_with_one_number_an_agent():
    one = {"kernel": jnp.ones((1, 1))}
    params = {"params": {"query": one, "key": one, "value": {"kernel": jnp.full((1, 1), 2.0)}}}
    x, attention = apply(1, params, jnp.array([[1.0], [0.0], [np.log(3.0)]]))
    # agent 0 (query 1): exp(0) : exp(log 3) = 1 : 3; agent 1 (query 0): even; agent 2 (query log 3): 3 : 1
    expected = [[0, 0.25, 0.75], [0.5, 0, 0.5], [0.75, 0.25, 0]]
    np.testing.assert_allclose(attention[0], expected, atol=1e-6)
    log3 = np.log(3.0)
    np.testing.assert_allclose(x[:, 0], [2 * 0.75 * log3, 1 + log3, 2 * 0.75], atol=1e-5)


def test_each_agent_spreads_one_over_the_others():
    h = 5.0 * jax.random.normal(jax.random.key(0), (4, 6, 8))
    _, attention = init(2, h)[0]
    np.testing.assert_allclose(attention.sum(-1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(jnp.diagonal(attention, axis1=-2, axis2=-1), 0.0)


def test_two_agents_attend_to_each_other_fully():
    maps, params = given(4)
    h = np.random.default_rng(2).normal(size=(2, 4))
    x, attention = apply(2, params, jnp.asarray(h, jnp.float32))
    np.testing.assert_allclose(attention, np.broadcast_to([[0.0, 1.0], [1.0, 0.0]], (2, 2, 2)), atol=1e-6)
    np.testing.assert_allclose(x, h[::-1] @ maps["value"], atol=1e-5)


def test_maps_are_shared_so_permuting_agents_permutes_the_result():
    h = jax.random.normal(jax.random.key(0), (3, 5, 8))
    (x, attention), params = init(2, h)
    order = np.array([3, 0, 4, 1, 2])
    moved_x, moved_attention = apply(2, params, h[:, order])
    np.testing.assert_allclose(moved_x, x[:, order], atol=1e-5)
    np.testing.assert_allclose(moved_attention, attention[:, :, order][..., order], atol=1e-5)
    kernels = {name: p["kernel"].shape for name, p in params["params"].items()}
    assert kernels == {"query": (8, 8), "key": (8, 8), "value": (8, 8)}


def test_a_single_agent_gathers_nothing():
    h = jax.random.normal(jax.random.key(0), (3, 1, 8))
    (x, attention), params = init(2, h)
    np.testing.assert_array_equal(x, np.zeros((3, 1, 8)))
    np.testing.assert_array_equal(attention, np.zeros((3, 2, 1, 1)))

    def loss(p, h):
        return jnp.sum((apply(2, p, h)[0] + 1.0) ** 2)

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(params, h)):
        assert np.isfinite(leaf).all()
