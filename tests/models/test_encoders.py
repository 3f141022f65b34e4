"""The user memory against a loop in float64, and the policy against the representation that training sees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmrf_jax import types
from mmrf_jax.agents.mmrf import acting, policy
from mmrf_jax.models import embeddings, encoders, representation

CONFIG = tiny.CONFIG
F, D = 3, 5

memory_write, memory_over_requests, encode_videos = (
    jax.jit(function, static_argnums=0)
    for function in (encoders.memory_write, encoders.memory_over_requests, embeddings.encode_videos)
)


def loop(items, feedback, mask, decays, start=None):
    """Sums and weights after each exposure of one user, oldest first, in float64; start: (outer, weight)."""
    outer, weight = start or (np.zeros((len(decays), F, D)), np.zeros(len(decays)))
    outer, weight = outer.copy(), weight.copy()
    for e, f, shown in zip(np.float64(items), np.float64(feedback), mask, strict=True):
        if shown:
            for n, decay in enumerate(decays):
                outer[n] = decay * outer[n] + np.outer(f, e)
                weight[n] = decay * weight[n] + 1.0
    return outer, weight


def exposures(seed, *shape):
    rng = np.random.default_rng(seed)
    items, feedback = rng.normal(size=(*shape, D)), rng.normal(size=(*shape, F))
    return items.astype(np.float32), feedback.astype(np.float32), rng.random(shape) < 0.7


def test_memory_slate_by_slate_equals_all_at_once_and_the_loop():
    items, feedback, mask = exposures(0, 4, 30)
    at_once = memory_write(CONFIG, None, items, feedback, mask)
    memory = None
    for part in (slice(0, 6), slice(6, 12), slice(12, 13), slice(13, 30)):
        memory = memory_write(CONFIG, memory, items[:, part], feedback[:, part], mask[:, part])
    for b in range(4):
        outer, weight = loop(items[b], feedback[b], mask[b], CONFIG.decays)
        for got in (at_once, memory):
            np.testing.assert_allclose(got.outer[b], outer, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(got.weight[b], weight, rtol=1e-5)
            np.testing.assert_allclose(got.mean()[b], outer / (weight + 2.0)[:, None, None], rtol=1e-4, atol=1e-5)


def test_memory_by_hand():
    config = dataclasses.replace(CONFIG, decays=(0.5,))
    items, feedback = jnp.array([[1.0], [10.0], [100.0]]), jnp.array([[1.0], [2.0], [3.0]])
    memory = memory_write(config, None, items, feedback, np.array([True, False, True]))
    assert memory.outer.item() == 0.5 * 1.0 + 300.0 and memory.weight.item() == 1.5  # the masked one does not age them


def test_without_a_mask_all_exposures_count():
    rng = np.random.default_rng(5)
    items, feedback = rng.normal(size=(2, 3, 4, 6)), rng.normal(size=(2, 3, 4, 5))
    start = memory_write(CONFIG, None, items, feedback)
    for memory in (None, start):
        found = memory_write(CONFIG, memory, items, feedback)
        wanted = memory_write(CONFIG, memory, items, feedback, np.ones((2, 3, 4), bool))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, wanted)


def test_memory_ignores_masked_entries_to_the_bit():
    items, feedback, mask = exposures(1, 3, 10)
    clean = memory_write(CONFIG, None, items, feedback, mask)
    noisy_items, noisy_feedback = np.where(mask[..., None], items, 1e6), np.where(mask[..., None], feedback, -1e6)
    noisy = memory_write(CONFIG, None, noisy_items, noisy_feedback, mask)
    assert not tiny.differences(clean, noisy)
    nothing = memory_write(CONFIG, clean, items, feedback, np.zeros_like(mask))
    assert not tiny.differences(clean, nothing)


@pytest.mark.parametrize("steps", [5, 18])
def test_memory_over_requests_is_the_memory_before_each(steps):
    items, feedback, mask = exposures(2, 3, steps, 4)
    mask[1, 2] = False  # a request without exposures
    start_items, start_feedback, start_mask = exposures(3, 3, 7)
    start = memory_write(CONFIG, None, start_items, start_feedback, start_mask)
    got = memory_over_requests(CONFIG, start, items, feedback, mask)
    assert got.outer.shape == (3, steps, len(CONFIG.decays), F, D)
    assert got.weight.shape == (3, steps, len(CONFIG.decays))
    for b in range(3):
        expected = loop(start_items[b], start_feedback[b], start_mask[b], CONFIG.decays)
        for t in range(steps):
            np.testing.assert_allclose(got.outer[b, t], expected[0], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(got.weight[b, t], expected[1], rtol=1e-5)
            expected = loop(items[b, t], feedback[b, t], mask[b, t], CONFIG.decays, expected)


@functools.partial(jax.jit, static_argnames="config")
def encode(config, state, batch, items, key=None):
    inputs = representation.gather(batch, items)
    rows = embeddings.lookup(state.tables, inputs.ids)
    return representation.encode(config, state.params["encoder"], rows, inputs, key)


@functools.partial(jax.jit, static_argnames="config")
def training_scores(config, state, batch, items, r):
    encodings = embeddings.encode_videos(config, state.params["encoder"], state.tables, items, batch.candidates)
    known = acting.critics_of(state, config)
    return acting.apply_actors(config, state.params["actor"], known, r.z, r.memory_mean, encodings).scores


def request_at(batch, t):
    return types.Request(batch.user_id, batch.profile, batch.context[:, t], batch.candidates[:, t])


def exposure_at(batch, t):
    videos = np.take_along_axis(batch.candidates[:, t], batch.slate[:, t], axis=-1)
    return types.Exposure(videos, batch.feedback[:, t], batch.slate_mask[:, t])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"ablation": "no_collaboration"}, marks=pytest.mark.slow),
        {"encoder": "gru"},
        pytest.param({"encoder": "transformer", "window": 3}, marks=pytest.mark.slow),
    ],
)
def test_serving_sees_what_training_saw(fields):
    """The same sessions through the policy, request by request, and through the batch encoder: memory and scores."""
    config = dataclasses.replace(CONFIG, dropout=0.5, **fields)  # dropout must be off in both
    state = tiny.make_state(dataclasses.replace(CONFIG, **fields))
    items, batch = tiny.make_items(), tiny.make_batch()
    r = encode(config, state, batch, items)
    trained, read = np.asarray(training_scores(config, state, batch, items, r)), np.asarray(r.memory_mean)
    served = policy.make_actor_ranker(state, items, config)
    all_scores = jax.jit(functools.partial(policy.all_scores, config))
    score = jax.jit(served.score)
    observe = jax.jit(served.observe)
    mean = jax.jit(lambda memory: memory.mean())
    memory = jax.jit(served.start)(served.params, request_at(batch, 0), batch.history)
    for t in range(batch.mask.shape[1]):
        live = batch.mask[:, t]
        np.testing.assert_allclose(np.asarray(mean(memory))[live], read[live, t], atol=1e-5)
        scores = np.asarray(all_scores(served.params, memory, request_at(batch, t)))
        np.testing.assert_allclose(scores[live], trained[live, t], atol=2e-5)
        main = score(served.params, memory, request_at(batch, t))
        np.testing.assert_allclose(scores[:, -1], main, atol=1e-6)
        memory = observe(served.params, memory, request_at(batch, t), exposure_at(batch, t))


@pytest.mark.parametrize(
    "fields", [{}, {"encoder": "gru"}, pytest.param({"encoder": "transformer", "window": 3}, marks=pytest.mark.slow)]
)
def test_feedback_reaches_later_requests_only(fields):
    config = dataclasses.replace(CONFIG, **fields)
    items, batch, state = tiny.make_items(), tiny.make_batch(), tiny.make_state(config)
    user = int(np.argmax(batch.mask.sum(1)))
    before = encode(config, state, batch, items)
    for signal in range(tiny.S):
        changed = batch.feedback.copy()
        changed[user, 1, 0, signal] += 1.0
        after = encode(config, state, batch.replace(feedback=changed), items)
        moved = np.abs(np.asarray(before.z - after.z)).max(-1) > 0
        expected = np.zeros_like(moved)
        expected[user, 2:] = True
        np.testing.assert_array_equal(moved, expected)


def test_a_user_has_a_row_of_his_own_and_strangers_have_none():
    items, batch, state = tiny.make_items(), tiny.make_batch(), tiny.make_state()
    same = dataclasses.replace(
        batch.history, videos=batch.history.videos * 0, feedback=batch.history.feedback * 0, mask=batch.history.mask & 0
    )
    batch = batch.replace(profile=np.zeros_like(batch.profile), context=np.zeros_like(batch.context), history=same)
    z = np.asarray(encode(CONFIG, state, batch, items).z[:, 0])
    known = tiny.SPEC.num_users
    assert known < len(z) and len(np.unique(z[:known].round(6), axis=0)) == known
    np.testing.assert_array_equal(z[known:], np.broadcast_to(z[-1], z[known:].shape))
    far = batch.replace(user_id=batch.user_id + 2_000_000_000)
    np.testing.assert_allclose(encode(CONFIG, state, far, items).z[:, 0], np.broadcast_to(z[-1], z.shape), atol=1e-6)


def test_dropout_in_training_only():
    config = dataclasses.replace(CONFIG, dropout=0.5)
    items, batch, state = tiny.make_items(), tiny.make_batch(), tiny.make_state(CONFIG)
    assert not tiny.differences(encode(config, state, batch, items), encode(CONFIG, state, batch, items))
    one, other = (encode(config, state, batch, items, jax.random.key(i)) for i in range(2))
    assert np.abs(np.asarray(one.z - other.z)).max() > 1e-3
    still = encode(CONFIG, state, batch, items, jax.random.key(0))
    assert not tiny.differences(still, encode(CONFIG, state, batch, items))


def test_item_encoding_holds_a_one_the_row_of_the_id_and_the_features():
    items, state = tiny.make_items(), tiny.make_state()
    videos = np.array([3, 0, 29])
    e = encode_videos(CONFIG, state.params["encoder"], state.tables, items, videos)
    assert e.shape == (3, CONFIG.dim + 2) == (3, encoders.sizes(CONFIG, tiny.SPEC)[1])
    np.testing.assert_array_equal(e[:, 0], 1.0)
    rows = state.tables["id"].rows[items.embedding_id[videos]]
    np.testing.assert_array_equal(e[:, 1 : 1 + CONFIG.id_dim], rows)
    np.testing.assert_array_equal(e[:, -2:], items.features[videos])
    np.testing.assert_allclose(policy.item_encodings(state, items, CONFIG)[videos], e, atol=1e-6)


def test_encodings_in_blocks_cover_the_whole_catalogue(monkeypatch):
    items, state = tiny.make_items(), tiny.make_state()
    whole = encode_videos(CONFIG, state.params["encoder"], state.tables, items, np.arange(30))
    monkeypatch.setattr(embeddings, "_BLOCK", 7)  # 30 videos: 5 blocks of 6
    blocks = policy.item_encodings.__wrapped__(state, items, CONFIG)
    np.testing.assert_allclose(blocks, whole, atol=1e-6)
    monkeypatch.setattr(embeddings, "_BLOCK", 8)  # 4 blocks of 8, the last one padded
    np.testing.assert_allclose(policy.item_encodings.__wrapped__(state, items, CONFIG), whole, atol=1e-6)


def test_user_state_ends_with_profile_and_context():
    items, batch, state = tiny.make_items(), tiny.make_batch(), tiny.make_state()
    z = encode(CONFIG, state, batch, items).z
    assert z.shape == (8, 5, CONFIG.state_dim + 3 + 2) and z.shape[-1] == encoders.sizes(CONFIG, tiny.SPEC)[0]
    np.testing.assert_array_equal(z[..., -2:], batch.context)
    np.testing.assert_array_equal(z[..., -5:-2], np.broadcast_to(batch.profile[:, None], (8, 5, 3)))


def test_blindness_hides_entries_and_keeps_their_means():
    """Of the features at the end of an encoding and the profile at the end of a state; never without a key."""
    items, batch, state = tiny.make_items(), tiny.make_batch(users=40), tiny.make_state()
    shown = np.take_along_axis(batch.candidates, batch.slate, axis=-1)
    features, profile = np.asarray(items.features)[shown], np.asarray(batch.profile)[:, None]

    @jax.jit
    def seen(feature_dropout, key=None):
        inputs = representation.gather(batch, items)
        rows = embeddings.lookup(state.tables, inputs.ids)
        return representation.encode(CONFIG, state.params["encoder"], rows, inputs, key, feature_dropout)

    r = seen(0.25, jax.random.key(5))
    np.testing.assert_array_equal(r.z[..., -2:], batch.context)
    for got, whole in ((r.shown[..., -2:], features), (r.z[:, :, -5:-2], profile)):
        hidden = np.asarray(got) == 0
        np.testing.assert_allclose(got, np.where(hidden, 0.0, whole / 0.75), rtol=1e-5)
        assert hidden.mean() == pytest.approx(0.25, abs=0.06)
    r = seen(0.25)
    np.testing.assert_array_equal(r.shown[..., -2:], features)
    np.testing.assert_array_equal(r.z[:, :, -5:-2], np.broadcast_to(profile, (40, 5, 3)))


def test_dropout_keeps_its_share_independently_in_each_entry():
    shape = (200, 40)
    draws = np.stack([encoders.kept(jax.random.key(seed), 0.25, shape) for seed in range(20)]).astype(float)
    assert abs(draws.mean() - 0.75) < 4 * np.sqrt(0.25 * 0.75 / draws.size)
    flat = draws.reshape(20, -1) - 0.75
    bound = 4.5 * 0.25 * 0.75  # of a mean of products of independent entries, times the root of their number
    for step in (1, 40):  # neighbours in a row and in a column
        assert abs((flat[:, step:] * flat[:, :-step]).mean()) < bound / np.sqrt(flat.size)
    assert abs((flat[1:] * flat[:-1]).mean()) < bound / np.sqrt(flat.size)  # the next key
    assert encoders.kept(jax.random.key(0), 0.0, shape).all()
