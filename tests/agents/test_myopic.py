"""The myopic ranker: what it predicts, what it ranks by, and what it leaves alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmrf_jax import ops, types
from mmrf_jax.agents import myopic
from mmrf_jax.agents.mmrf import networks, policy
from mmrf_jax.envs import rankers
from mmrf_jax.models import embeddings, heads, representation
from mmrf_jax.signals import SHORT_VIDEO

CONFIG = tiny.CONFIG


def request(batch, t=0):
    return types.Request(batch.user_id, batch.profile, batch.context[:, t], batch.candidates[:, t])


@pytest.fixture(scope="module")
def items():
    return tiny.make_items()


@pytest.fixture(scope="module")
def step(items):
    fn = functools.partial(jax.jit(myopic.update, static_argnames="config"), config=CONFIG)
    return lambda state, batch: fn(state, batch, items)


def test_ranks_by_predicted_watch_time(items):
    """Its scores are the standardised logs of the seconds that the critic expects, over tau."""
    batch, state = tiny.make_batch(), tiny.make_state()
    served = myopic.make(state, items, CONFIG)
    memory = served.start(served.params, request(batch), batch.history)
    scores = served.score(served.params, memory, request(batch))
    assert scores.shape == batch.candidates[:, 0].shape
    z = policy.user_state(CONFIG, served.params, memory, request(batch))
    e = embeddings.encode_videos(CONFIG, state.params["encoder"], state.tables, items, batch.candidates[:, 0])
    out = networks.Critic(CONFIG).apply(state.params["critic"], z, memory.mean(), e)
    seconds = heads.expected_feedback(SHORT_VIDEO, out.feedback, state.reward_scale)[:, SHORT_VIDEO.index("watch_time")]
    log = np.log(np.float64(seconds))
    expected = (log - log.mean(-1, keepdims=True)) / log.std(-1, keepdims=True) / CONFIG.temperature
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(ops.top_k(scores, 3), ops.top_k(seconds, 3))


def test_policy_by_hand(items):
    """A critic whose watch-time vector reads one dimension of the encoding ranks by that dimension."""
    batch, state = tiny.make_batch(), tiny.make_state()
    critic = jax.tree.map(jnp.zeros_like, state.params["critic"])
    bias = critic["params"]["heads"]["signals"]["Dense_0"]["bias"].reshape(tiny.S, -1)
    critic["params"]["heads"]["signals"]["Dense_0"]["bias"] = (
        bias.at[SHORT_VIDEO.index("watch_time"), 2].set(-1.5).reshape(-1)
    )
    critic["params"]["heads"]["prior"] = (
        critic["params"]["heads"]["prior"].at[SHORT_VIDEO.index("watch_time")].set(0.25)
    )
    served = myopic.make(state.replace(params=state.params | {"critic": critic}), items, CONFIG, temperature=0.7)
    assert served.temperature == 0.7 and not isinstance(served, rankers.PrivilegedPolicy)
    memory = served.start(served.params, request(batch), batch.history)
    rows = state.tables["id"].rows[items.embedding_id[batch.candidates[:, 0]]]  # dimensions 1 … id_dim
    scores = np.asarray(served.score(served.params, memory, request(batch)))
    np.testing.assert_array_equal(scores.argsort(-1), (-rows[..., 1]).argsort(-1))


def test_serves_without_actors(items):
    served = myopic.make(tiny.make_state(), items, CONFIG)
    assert set(served.params) == {"encoder", "critic", "encodings", "duration", "users", "scale"}
    other = myopic.make(tiny.make_state(seed=1), items, CONFIG)
    assert served.score is other.score and served.observe is other.observe  # jitted rollouts compile once


def test_loss_is_that_of_watch_time_over_exposures(items, step):
    batch, state = tiny.make_batch(), tiny.make_state()
    _, metrics = step(state, batch)
    encode = jax.jit(representation.encode_batch, static_argnums=0)
    r = encode(CONFIG, state.params["encoder"], state.tables, batch, items)
    critic = jax.jit(networks.Critic(CONFIG).apply)
    raw = np.float64(critic(state.params["critic"], r.z, r.memory_mean, r.shown).feedback)
    total, count = 0.0, 0
    for b, t, k in zip(*np.nonzero(batch.slate_mask[:, :-1] & batch.mask[:, :-1, None]), strict=True):
        eta = raw[b, t, SHORT_VIDEO.index("watch_time"), k]
        total += np.exp(eta) - batch.feedback[b, t, k, SHORT_VIDEO.index("watch_time")] / 15.0 * eta
        count += 1
    assert float(metrics["loss/watch_time"]) == pytest.approx(total / count, rel=1e-4)


def test_learns_watch_time_and_nothing_else(step):
    before, batch = tiny.make_state(), tiny.make_batch()
    reference, _ = step(before, batch)
    feedback = batch.feedback.copy()
    feedback[:, -1] += 5.0  # the request to bootstrap from
    feedback[~batch.slate_mask] = 9.0
    assert not tiny.differences(reference, step(before, batch.replace(feedback=feedback))[0])
    over = batch.replace(terminated=~batch.terminated, truncated=~batch.truncated)
    assert not tiny.differences(reference, step(before, over)[0])
    state, history = before, []
    for _ in range(100):
        state, metrics = step(state, batch)
        history.append(float(metrics["loss/watch_time"]))
    assert np.mean(history[-5:]) < np.mean(history[:5]) - 0.05


def test_heads_of_the_future_get_no_gradient(items):
    """With plain SGD, which has no weight decay, only what predicts watch time moves."""
    config = dataclasses.replace(CONFIG, optimizer="sgd", learning_rate=0.05)
    before = tiny.make_state(config)
    fn = jax.jit(functools.partial(myopic.update, config=config))
    after, _ = fn(before, tiny.make_batch(), items)
    moved = tiny.differences(before.params, after.params)
    assert any("encoder" in name for name in moved) and any("signals" in name for name in moved)
    assert not any(part in name for name in moved for part in ("actor", "value", "stay"))
