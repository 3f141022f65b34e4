"""Wide & Deep, DeepFM and LTR: their parts by hand, what they regress, and what they rank by."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmrf_jax import types
from mmrf_jax.agents import deepfm, ltr, registry, supervised, wide_deep
from mmrf_jax.agents.mmrf import agent_state, encoding
from mmrf_jax.models import heads
from mmrf_jax.signals import SHORT_VIDEO

CONFIG = dataclasses.replace(tiny.CONFIG, ablation="no_augmentation")
NAMES = ("wide_deep", "deepfm", "ltr")


@functools.cache
def initial_state(name: str) -> agent_state.AgentState:
    critic = registry.get(name).critic
    return tiny.init(jax.random.key(0), CONFIG, tiny.SPEC, tiny.make_items(), tiny.MEAN, tiny.STD, critic=critic)


def test_pairs_are_sums_of_products():
    fields = np.random.default_rng(0).normal(size=(3, 4, 5))
    expected = sum(fields[:, i] * fields[:, j] for i in range(4) for j in range(i))
    np.testing.assert_allclose(deepfm.pairs(jnp.asarray(fields)), expected, rtol=1e-4, atol=1e-5)


def test_crosses_read_the_memory_at_each_video():
    rng = np.random.default_rng(0)
    memory, items = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 6, 5))
    out = np.asarray(wide_deep.crosses(jnp.asarray(memory), jnp.asarray(items)))
    assert out.shape == (2, 6, 12)
    assert out[1, 2, 4 * 2 + 3] == pytest.approx(memory[1, 2, 3] @ items[1, 2], rel=1e-4)


def test_weighted_sum_by_hand():
    rng = np.random.default_rng(0)
    raw, scale = rng.normal(size=(tiny.S, 4)), rng.uniform(0.1, 1.0, tiny.S)
    expected = np.zeros(4)
    for name, weight in zip(SHORT_VIDEO.names, ltr.signal_weights(SHORT_VIDEO), strict=True):
        x = raw[SHORT_VIDEO.index(name)]
        expected += weight * (
            np.exp(x) if name == "watch_time" else 1 / (1 + np.exp(-x)) / scale[SHORT_VIDEO.index(name)]
        )
    np.testing.assert_allclose(ltr.weighted_sum(CONFIG, jnp.asarray(raw), jnp.asarray(scale)), expected, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_starts_from_base_rates_and_learns_every_signal(name):
    items, batch, state = tiny.make_items(), tiny.make_batch(), initial_state(name)
    method = registry.get(name)

    @jax.jit
    def predict(state):
        r = encoding.encode_batch(CONFIG, state.params["encoder"], state.tables, batch, items)
        out = method.critic(CONFIG).apply(state.params["critic"], r.z, r.memory_mean, r.shown).feedback
        loss = heads.feedback_loss(SHORT_VIDEO, out[:, :-1], batch.feedback[:, :-1], state.reward_scale)
        return heads.expected_feedback(SHORT_VIDEO, out, state.reward_scale), loss

    expected, loss = map(np.asarray, predict(state))
    mean = expected.mean(axis=(0, 1, 3))
    np.testing.assert_allclose(mean[:-1], 0.3, atol=0.12)
    assert mean[-1] == pytest.approx(15.0, rel=0.3)
    step = functools.partial(tiny.learner(name), config=CONFIG)
    _, first = step(state, batch, items)
    exposed = (batch.slate_mask & batch.mask[..., None])[:, :-1, :, None]
    by_hand = (exposed * loss).sum(axis=(0, 1, 2)) / exposed.sum()
    for i, s in enumerate(SHORT_VIDEO.names):
        assert float(first[f"loss/{s}"]) == pytest.approx(by_hand[i], rel=1e-4), s
    moved = tiny.differences(state.params, step(state, batch, items)[0].params)
    assert any("encoder" in path for path in moved)
    for _ in range(50):
        state, metrics = step(state, batch, items)
    for s in SHORT_VIDEO.names:
        assert float(metrics[f"loss/{s}"]) < float(first[f"loss/{s}"]), s


@pytest.mark.parametrize("name", NAMES)
def test_serves_the_order_of_its_rule(name):
    """Served scores are the offline scores' last column, standardised and over tau."""
    items, batch, state = tiny.make_items(), tiny.make_batch(), initial_state(name)
    method = registry.get(name)
    step = functools.partial(tiny.learner(name), config=CONFIG)
    for _ in range(20):
        state, _ = step(state, batch, items)
    served = method.make_policy(state, items, CONFIG)
    request = types.Request(batch.user_id, batch.profile, batch.context[:, 0], batch.candidates[:, 0])

    @jax.jit
    def serve(params, request, history):
        return served.score(params, served.start(params, request, history), request)

    scores = np.float64(serve(served.params, request, batch.history))
    offline = np.float64(registry.score_candidates(state, batch, items, CONFIG, name))[:, 0]
    assert offline.shape == (8, CONFIG.num_agents, 8) and method.signals(CONFIG) == CONFIG.signals
    main = offline[:, -1]
    expected = (main - main.mean(-1, keepdims=True)) / (main.std(-1, keepdims=True) + 1e-6) / CONFIG.temperature
    np.testing.assert_allclose(scores, expected, rtol=2e-2, atol=2e-2)


def test_columns_of_hate_count_negative():
    raw = jnp.asarray(np.random.default_rng(0).normal(size=(tiny.S, 4)))
    out = supervised.scores(CONFIG, raw, raw[0])
    np.testing.assert_array_equal(out[1], -raw[SHORT_VIDEO.index("hate")])  # signals: click, hate, watch_time
    np.testing.assert_array_equal(out[0], raw[SHORT_VIDEO.index("click")])
