"""The myopic ranker: what it predicts, what it ranks by, and what it leaves alone."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from mmrf_jax import ops, types
from mmrf_jax.agents import registry
from mmrf_jax.agents.mmrf import encoding, networks, policy
from mmrf_jax.envs import rankers
from mmrf_jax.models import embeddings, heads
from mmrf_jax.signals import SHORT_VIDEO

MYOPIC = registry.get("myopic")
WATCH = SHORT_VIDEO.index("watch_time")
CONFIG = tiny.CONFIG
SGD = dataclasses.replace(CONFIG, optimizer="sgd", learning_rate=0.05)


def request(batch, t=0):
    return types.Request(batch.user_id, batch.profile, batch.context[:, t], batch.candidates[:, t])


@pytest.fixture(scope="module")
def items():
    return tiny.make_items()


@pytest.fixture(scope="module")
def step(items):
    """An update without weight decay."""
    return lambda state, batch: tiny.learner("myopic")(state, batch, items, config=SGD)


@pytest.fixture(scope="module")
def serve(items):
    """serve(params) -> the scores of the first requests."""
    served, batch = MYOPIC.make_policy(tiny.make_state(), items, CONFIG), tiny.make_batch()
    asked = request(batch)
    return jax.jit(lambda params: served.score(params, served.start(params, asked, batch.history), asked))


def test_ranks_by_predicted_watch_time(items, serve):
    """Its scores are the standardised logs of the seconds that the critic expects, over tau."""
    batch, state = tiny.make_batch(), tiny.make_state()
    served = MYOPIC.make_policy(state, items, CONFIG)
    scores = serve(served.params)
    assert scores.shape == batch.candidates[:, 0].shape

    @jax.jit
    def predict(params, state):
        memory = served.start(params, request(batch), batch.history)
        z = policy.user_state(CONFIG, params, memory, request(batch))
        e = embeddings.encode_videos(CONFIG, state.params["encoder"], state.tables, items, batch.candidates[:, 0])
        out = networks.Critic(CONFIG).apply(state.params["critic"], z, memory.mean(), e)
        return heads.expected_feedback(SHORT_VIDEO, out.feedback, state.reward_scale)[:, WATCH]

    seconds = predict(served.params, state)
    log = np.log(np.float64(seconds))
    expected = (log - log.mean(-1, keepdims=True)) / log.std(-1, keepdims=True) / CONFIG.temperature
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(ops.top_k(scores, 3), ops.top_k(seconds, 3))


def test_policy_by_hand(items, serve):
    """A critic whose watch-time vector reads one dimension of the encoding ranks by that dimension."""
    batch, state = tiny.make_batch(), tiny.make_state()
    critic = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.params["critic"])
    learned = critic["params"]["heads"]
    learned["signals"]["Dense_0"]["bias"].reshape(tiny.S, -1)[WATCH, 2] = -1.5
    learned["prior"][WATCH] = 0.25
    served = MYOPIC.make_policy(state.replace(params=state.params | {"critic": critic}), items, CONFIG, temperature=0.7)
    assert served.temperature == 0.7 and not isinstance(served, rankers.PrivilegedPolicy)
    rows = np.asarray(state.tables["id"].rows)[np.asarray(items.embedding_id)[batch.candidates[:, 0]]]  # 1 … id_dim
    np.testing.assert_array_equal(np.asarray(serve(served.params)).argsort(-1), (-rows[..., 1]).argsort(-1))


def test_serves_without_actors(items):
    served = MYOPIC.make_policy(tiny.make_state(), items, CONFIG)
    assert set(served.params) == {"encoder", "critic", "encodings", "duration", "users", "scale"}
    other = MYOPIC.make_policy(tiny.make_state(seed=1), items, CONFIG)
    assert served.score is other.score and served.observe is other.observe  # jitted rollouts compile once


def test_loss_is_that_of_watch_time_over_exposures(items, step):
    batch, state = tiny.make_batch(), tiny.make_state(SGD)
    _, metrics = step(state, batch)

    @jax.jit
    def predict(state):
        r = encoding.encode_batch(CONFIG, state.params["encoder"], state.tables, batch, items)
        return networks.Critic(CONFIG).apply(state.params["critic"], r.z, r.memory_mean, r.shown).feedback

    raw, total, count = np.float64(predict(state)), 0.0, 0
    for b, t, k in zip(*np.nonzero(batch.slate_mask[:, :-1] & batch.mask[:, :-1, None]), strict=True):
        eta = raw[b, t, WATCH, k]
        total += np.exp(eta) - batch.feedback[b, t, k, WATCH] / 15.0 * eta
        count += 1
    assert float(metrics["loss/watch_time"]) == pytest.approx(total / count, rel=1e-4)


def test_learns_watch_time_and_nothing_else(step):
    before, batch = tiny.make_state(SGD), tiny.make_batch()
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


def test_heads_of_the_future_get_no_gradient(step):
    """Only what predicts watch time moves."""
    before = tiny.make_state(SGD)
    after, _ = step(before, tiny.make_batch())
    moved = tiny.differences(before.params, after.params)
    assert any("encoder" in name for name in moved) and any("signals" in name for name in moved)
    assert not any(part in name for name in moved for part in ("actor", "value", "stay"))
