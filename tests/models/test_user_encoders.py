"""GRU and transformer against loops over one user's requests in float64; all encoders step by step and at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmrf_jax.models import encoders, user_encoders
from mmrf_jax.models.sequence import EncodedExposure

B, T, H, W = 3, 6, 7, 3
F, D = tiny.CONFIG.feedback_dim, tiny.CONFIG.dim + tiny.SPEC.item_features
K, E = tiny.CONFIG.slate, tiny.CONFIG.state_dim


def config_of(encoder):
    return dataclasses.replace(tiny.CONFIG, encoder=encoder, window=W)


@functools.cache
def params_of(encoder):
    """Random parameters, none of them 0."""
    shapes = jax.eval_shape(lambda key: encoders.init_encoder(key, config_of(encoder), tiny.SPEC), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)


@functools.cache
def exposures():
    """A history and T requests of B users; some requests have no exposures, also in the middle."""
    rng = np.random.default_rng(1)

    def shown(*shape, **fields):
        items, feedback = rng.normal(size=(*shape, D)), rng.normal(size=(*shape, F))
        return EncodedExposure(np.float32(items), np.float32(feedback), **fields)

    mask = rng.random((B, T, K)) < 0.7
    mask[0, 2] = mask[1, :2] = mask[2, -1] = False
    history = shown(B, H, mask=np.arange(H) >= np.array([0, 2, H])[:, None])  # whole, the last five, none
    context = np.float32(rng.normal(size=(B, T, tiny.SPEC.context)))
    return history, shown(B, T, K, mask=mask, context=context)


@functools.cache
def carried(encoder):
    """The carries before each request, those of single steps, and the one after all requests at once."""
    users, (history, shown) = user_encoders.of(config_of(encoder)), exposures()

    @jax.jit
    def run(params):
        start = users.start(params, history)
        steps = [start]
        for t in range(T):
            steps.append(users.update(params, steps[-1], jax.tree.map(lambda x, t=t: x[:, t], shown)))
        return users.before_each(params, start, shown), steps, users.update_all(params, start, shown)

    return jax.device_get(run(params_of(encoder)))


@pytest.mark.parametrize("encoder", ["memory", "gru", "transformer"])
def test_requests_one_at_a_time_give_what_all_of_them_give_in_parallel(encoder):
    every, steps, last = carried(encoder)
    for t in range(T):
        at = jax.tree.map(lambda x, t=t: x[:, t], every)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), at, steps[t])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), last, steps[-1])
    # A request without exposures changes nothing.
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y[0]), steps[2], steps[3])
    assert not all(np.array_equal(x[1], y[1]) for x, y in zip(*map(jax.tree.leaves, (steps[2], steps[3])), strict=True))


@pytest.mark.parametrize("encoder", ["memory", "gru", "transformer"])
def test_a_new_user_has_zeros(encoder):
    users = user_encoders.of(config_of(encoder))
    assert all(not np.any(x) and x.shape[0] == B for x in jax.tree.leaves(users.init((B,), D)))
    carry = carried(encoder)[1][0]
    shapes = jax.eval_shape(lambda: users.init((B,), D))
    assert jax.tree.map(np.shape, carry) == jax.tree.map(np.shape, shapes)
    assert all(not np.any(x[2]) for x in jax.tree.leaves(carry))  # of an empty history


def requests_of(b):
    """(items, feedback, context) of each request of a user, the history's first; without empty ones."""
    history, shown = exposures()
    seen = np.flatnonzero(history.mask[b])
    cuts = [seen[max(end - K, 0) : end] for end in range(len(seen), 0, -K)][::-1]
    out = [(history.items[b, cut], history.feedback[b, cut], None) for cut in cuts]
    for t in range(T):
        mask = shown.mask[b, t]
        out.append((shown.items[b, t, mask], shown.feedback[b, t, mask], shown.context[b, t]))
    return len(cuts), [tuple(None if x is None else np.float64(x) for x in request) for request in out]


def vector(p, request):
    """One request as a vector; None without exposures."""
    items, feedback, context = request
    if not len(items):
        return None
    mean = sum(np.outer(f, e) for f, e in zip(feedback, items, strict=True)) / len(items)
    x = np.append(mean.reshape(-1), np.log1p(len(items))) @ p["shown"]["kernel"] + p["shown"]["bias"]
    return x if context is None else x + context @ p["context"]["kernel"]


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def gru(p, requests):
    """The state after each request."""
    h, out = np.zeros(E), []
    for request in requests:
        x = vector(p["requests"], request)
        if x is not None:
            from_state = h @ p["hidden"]
            r, z = sigmoid(x[:E] + from_state[:E]), sigmoid(x[E : 2 * E] + from_state[E : 2 * E])
            n = np.tanh(x[2 * E :] + r * (from_state[2 * E :] + p["hidden_bias"]))
            h = (1.0 - z) * n + z * h
        out.append(h)
    return out


def norm(p, x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def transformer(p, requests):
    """The state after each request; lists of all keys and values, of which only the last W are looked at."""
    layers = [(p["layer_0"], []), (p["layer_1"], [])]
    state, out, width = np.zeros(E), [], max(E // 4, 1)
    for request in requests:
        x = vector(p["requests"], request)
        if x is not None:
            for q, written in layers:
                query, key, value = np.split(dense(q["attend"], norm(q["norm_in"], x)).reshape(3, 4, width), 3)
                written.append((key[0], value[0]))
                read = []
                for head in range(4):
                    near = written[-W:][::-1]  # by age
                    logits = np.array([k[head] @ query[0, head] for k, _ in near]) / np.sqrt(width)
                    weights = np.exp(logits + q["by_age"][head, : len(near)])
                    read.append(weights / weights.sum() @ np.array([v[head] for _, v in near]))
                x = x + dense(q["out"], np.concatenate(read))
                hidden = dense(q["hidden"], norm(q["norm_hidden"], x))
                gelu = 0.5 * hidden * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (hidden + 0.044715 * hidden**3)))
                x = x + dense(q["mlp"], gelu)
            state = norm(p["norm"], x)
        out.append(state)
    return out


@pytest.mark.parametrize("reference", [gru, transformer])
def test_states_are_those_of_a_loop(reference):
    p = jax.tree.map(np.float64, params_of(reference.__name__)["params"]["sequence"])
    every, _, last = carried(reference.__name__)
    for b in range(B):
        before, requests = requests_of(b)
        states = [np.zeros(E), *reference(p, requests)][before:]
        for t in range(T):
            np.testing.assert_allclose(every.state[b, t], states[t], rtol=1e-3, atol=1e-4)
            wanted = (states[t] @ p["reads"]["out"]["kernel"]).reshape(1, F, D)
            np.testing.assert_allclose(every.mean()[b, t], wanted, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(last.state[b], states[T], rtol=1e-3, atol=1e-4)


def test_a_transformer_forgets_what_its_window_has_lost():
    """One layer sees W requests, so two layers see 2 W - 1; what is before these changes nothing."""
    users, (history, shown) = user_encoders.of(config_of("transformer")), exposures()
    whole = dataclasses.replace(shown, mask=np.ones((B, T, K), bool))

    @jax.jit
    def last(params, items):
        start = users.start(params, dataclasses.replace(history, mask=np.zeros((B, H), bool)))
        return users.update_all(params, start, dataclasses.replace(whole, items=items)).state

    params = params_of("transformer")
    states = [last(params, whole.items)]
    for t in range(T):
        changed = whole.items.copy()
        changed[:, t] += 1.0
        states.append(last(params, changed))
    moved = [bool(np.abs(np.asarray(x - states[0])).max() > 1e-6) for x in states[1:]]
    assert moved == [t >= T - (2 * W - 1) for t in range(T)] and not moved[0]


def test_a_history_is_cut_from_its_newest_exposure():
    videos = np.arange(1, 8)[None]
    np.testing.assert_array_equal(user_encoders.in_requests(videos, 3, 1), [[[0, 0, 1], [2, 3, 4], [5, 6, 7]]])
    np.testing.assert_array_equal(user_encoders.in_requests(videos[:, :3], 3, 1), [[[1, 2, 3]]])
    assert user_encoders.in_requests(np.zeros((2, 0, 5)), 3, 1).shape == (2, 1, 3, 5)
