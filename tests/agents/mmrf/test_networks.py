"""Scores by an MLP next to those by products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.agents.mmrf.networks import Actor, HiddenScores

RNG = np.random.default_rng(0)


def gelu(x):
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def test_hidden_scores_are_those_of_an_mlp_over_both():
    vectors, items = RNG.normal(size=(2, 3, 4)), RNG.normal(size=(2, 5, 4))
    user, video, bias, out = (RNG.normal(size=shape) for shape in ((4, 6), (4, 6), (6,), (3, 6)))
    params = {"user": {"kernel": user, "bias": bias}, "video": {"kernel": video}, "out": out}
    params = {"params": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)}
    scores = jax.jit(HiddenScores(6).apply)(params, jnp.asarray(vectors, jnp.float32), jnp.asarray(items, jnp.float32))
    assert scores.shape == (2, 3, 5)
    both = np.concatenate([user, video])  # [2D, width], over the pair of vector and encoding
    for b in range(2):
        for n in range(3):
            for c in range(5):
                pair = np.concatenate([vectors[b, n], items[b, c]])
                np.testing.assert_allclose(scores[b, n, c], out[n] @ gelu(pair @ both + bias), rtol=1e-4, atol=1e-5)


def test_the_mlp_adds_to_the_products_of_all_agents():
    config = dataclasses.replace(tiny.CONFIG, score_hidden=5)
    z, memory, items = RNG.normal(size=(2, 7)), RNG.normal(size=(2, 1, 2, 12)), RNG.normal(size=(2, 8, 12))
    args = [jnp.asarray(x, jnp.float32) for x in (z, memory, items)]
    params = jax.jit(Actor(config).init)(jax.random.key(0), *args)["params"]
    hidden = params.pop("hidden")
    products = jax.jit(Actor(tiny.CONFIG).apply)({"params": params}, *args).scores
    apply = jax.jit(Actor(config).apply)

    def scores(out):
        return apply({"params": params | {"hidden": hidden | {"out": out}}}, *args).scores

    np.testing.assert_allclose(scores(jnp.zeros_like(hidden["out"])), products, atol=1e-6)
    assert (np.abs(scores(10.0 * hidden["out"]) - products).max(axis=(0, 2)) > 1e-3).all()


def test_a_width_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"agents.score_hidden is 0; use 1 or more"):
        AgentConfig(score_hidden=0)
