"""The learned environment behind the contract of all environments, and the states it shares with training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_logs
import tiny

from mmrf_jax import ops, types
from mmrf_jax.envs import learned, rankers, rollout
from mmrf_jax.envs.environment import Environment
from mmrf_jax.models.feedback_model import network
from mmrf_jax.signals import SHORT_VIDEO

CONFIG, S, WATCH = tiny.FEEDBACK, tiny.S, SHORT_VIDEO.index("watch_time")
B, C, K, MAX = 64, 8, 3, 4
reset, step, predict = jax.jit(learned.reset), jax.jit(learned.step), jax.jit(learned.predict)
KEY, IDS = jax.random.key(7), jnp.arange(B, dtype=jnp.int32)


@pytest.fixture(scope="module")
def log():
    log = random_logs.make_log(0, 40, scores=False, spec=tiny.SPEC, longest=3)
    log.history_feedback[..., WATCH] *= 30.0
    log.user_id = (np.arange(40) % 9).astype(np.int32)  # of which six have rows of their own
    log.validate(tiny.SPEC)
    return log


@pytest.fixture(scope="module")
def items():
    return tiny.make_items()


@pytest.fixture(scope="module")
def model():
    """Whose users differ widely in whether they stay."""
    state = tiny.make_feedback_model()
    heads = state.params["heads"]["params"]
    wide = {name: jax.tree.map(lambda x: 4.0 * x, heads[name]) for name in ("stay", "stay_items")}
    return state.replace(params=state.params | {"heads": {"params": heads | wide}})


@pytest.fixture(scope="module")
def make(log, items, model):
    return functools.partial(learned.make_learned_env, model, items, CONFIG, log, MAX)


@pytest.fixture(scope="module")
def sim(make):
    return make()


def random_slates(seed, users=B):
    return np.random.default_rng(seed).random((users, C)).argsort(axis=1)[:, :K].astype(np.int32)


def take(tree, where):
    return jax.tree.map(lambda x: np.asarray(x)[where], tree)


def close(a, b):
    return max(tiny.differences(a, b).values(), default=0.0) < 1e-5


def test_shapes_of_the_contract(sim, items):
    request, history, state = reset(KEY, sim.default_params, IDS, 0)
    assert isinstance(sim, Environment) and sim.items is items and sim.slate_size == K

    def check(r):
        return [x.shape for x in jax.tree.leaves(r)] == [(B,), (B, 3), (B, 2), (B, C)]

    assert check(request)
    assert history.videos.shape == (B, 4) and history.feedback.shape == (B, 4, S) and history.mask.dtype == bool
    result, after = step(KEY, state, random_slates(0), sim.default_params)
    assert jax.tree.structure(after) == jax.tree.structure(state) and check(result.request)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert old.shape == new.shape and old.dtype == new.dtype and old.shape[0] == B
    shown = result.exposure
    assert shown.videos.shape == (B, K) and shown.feedback.shape == (B, K, S) and shown.mask.any(axis=1).all()
    np.testing.assert_array_equal(shown.videos, np.take_along_axis(request.candidates, random_slates(0), axis=1))
    for over in (result.terminated, result.truncated):
        assert over.shape == (B,) and over.dtype == bool
    days = sim.next_visit(KEY, after, sim.default_params)
    np.testing.assert_array_equal(days, np.ones(B, np.int32))


def test_a_user_is_the_same_in_any_company(sim):
    """Whatever the order of the users, and which other users are in the call."""

    def serve(ids):
        request, history, state = reset(KEY, sim.default_params, ids, 3)
        out = [(request, history)]
        for t in range(3):
            result, state = step(KEY, state, random_slates(t, 1000)[ids], sim.default_params)
            out.append(result)
        return out, state

    order = np.random.default_rng(1).permutation(B)
    ours, theirs = serve(IDS), serve(IDS[order])
    assert close(take(ours, order), theirs)
    mixed = serve(jnp.concatenate([IDS[:20], 500 + jnp.arange(B - 20)]))
    assert close(take(ours, slice(0, 20)), take(mixed, slice(0, 20)))
    other = reset(jax.random.key(8), sim.default_params, IDS, 3)[2], reset(KEY, sim.default_params, IDS, 4)[2]
    for state in other:
        assert (np.asarray(state.session) != np.asarray(ours[1].session)).mean() > 0.8
    assert len(np.unique(np.asarray(ours[1].session))) > 20  # of 40


def test_a_session_starts_as_in_the_log(sim, log):
    request, history, state = reset(KEY, sim.default_params, IDS, 0)
    n = np.asarray(state.session)
    np.testing.assert_array_equal(request.user_id, log.user_id[n])
    np.testing.assert_array_equal(request.profile, log.profile[n])
    np.testing.assert_array_equal(history.videos, log.history_videos[n])
    np.testing.assert_array_equal(history.feedback, log.history_feedback[n])
    np.testing.assert_array_equal(history.mask, log.history_mask[n])
    np.testing.assert_array_equal(state.user_id, IDS)  # of the simulation


def test_candidates_are_the_logs_while_it_lasts_then_those_of_others(sim, log):
    request, _, state = reset(KEY, sim.default_params, IDS, 0)
    n = np.asarray(state.session)
    first, length = log.offsets[n], np.diff(log.offsets)[n]
    assert set(length) == {1, 2, 3}
    others = []
    for t in range(4):
        row = np.asarray(state.row)
        own = t < length
        np.testing.assert_array_equal(row[own], (first + t)[own])
        others.append(row[~own])
        np.testing.assert_array_equal(request.candidates, log.candidates[row])
        np.testing.assert_array_equal(request.context[:, :-1], log.context[row, :-1])
        np.testing.assert_allclose(request.context[:, -1], np.full(B, np.log1p(t)), rtol=1e-6)
        np.testing.assert_array_equal(request.profile, log.profile[n])
        np.testing.assert_array_equal(state.position, np.full(B, t))
        result, state = step(KEY, state, random_slates(t), sim.default_params)
        request = result.request
    others = np.concatenate(others)
    assert len(np.unique(others)) > 0.5 * min(len(others), log.num_requests)
    assert others.min() < 0.1 * log.num_requests and others.max() > 0.9 * log.num_requests


def test_sessions_are_cut_at_their_longest(sim):
    _, _, state = reset(KEY, sim.default_params, IDS, 0)
    for t in range(MAX):
        result, state = step(KEY, state, random_slates(t), sim.default_params)
        assert not (result.terminated & result.truncated).any()
        if t < MAX - 1:
            assert not result.truncated.any()
    np.testing.assert_array_equal(result.truncated, ~np.asarray(result.terminated))
    assert 0 < np.asarray(result.truncated).sum() < B


def test_served_by_the_log_its_slates_come_first_and_in_order(sim, log):
    _, _, state = reset(KEY, sim.default_params, IDS, 0)
    for t in range(3):
        scores = learned.logged_slates(sim.default_params, state)
        assert scores.shape == (B, C)
        served, logged = np.asarray(ops.top_k(scores, K)), log.slate[np.asarray(state.row)]
        assert (logged[:, 0] >= 0).all() and (logged[:, -1] < 0).any()
        np.testing.assert_array_equal(np.where(logged >= 0, served, -1), logged)
        _, state = step(KEY, state, random_slates(t), sim.default_params)


@pytest.fixture(scope="module")
def crowd(sim, log):
    """One step of 4,096 users: their state, slates, what was predicted of them, and what happened."""
    request, _, state = reset(KEY, sim.default_params, jnp.arange(4096), 0)
    slates = random_slates(5, 4096)
    videos = np.take_along_axis(request.candidates, slates, axis=1)
    out = predict(sim.default_params, state, videos)
    result, _ = step(KEY, state, slates, sim.default_params)
    logged = (log.slate[np.asarray(state.row)] >= 0).sum(axis=1)  # videos of that request
    shown = np.arange(K) < logged[:, None]
    assert shown.any(axis=1).all() and not shown.all()
    np.testing.assert_array_equal(result.exposure.mask, shown)
    np.testing.assert_array_equal(np.asarray(result.exposure.feedback)[~shown], 0.0)
    stay = np.float64(jax.jit(network.continue_prob)(out, shown.astype(np.float32)))
    expected = jax.jit(network.expected, static_argnums=0)(CONFIG, out, sim.default_params.scale)
    expected = np.float64(expected) * shown[..., None]
    return state, slates, expected, stay, result


def test_users_stay_as_often_as_predicted(crowd):
    _, _, _, stay, result = crowd
    stayed = ~np.asarray(result.terminated)
    for part in np.array_split(np.argsort(stay), 4):
        p = stay[part]
        assert abs((stayed[part] - p).sum()) < 4.5 * np.sqrt((p * (1 - p)).sum())
    assert stay.std() > 0.1


def test_feedback_is_drawn_as_expected(crowd):
    _, _, expected, _, result = crowd
    drawn = np.float64(result.exposure.feedback)
    assert set(np.unique(drawn[..., :WATCH])) == {0.0, 1.0} and (drawn[..., WATCH] >= 0).all()
    p = expected[..., :WATCH]
    for half in (p < np.median(p, axis=(0, 1)), p >= np.median(p, axis=(0, 1))):
        error = np.where(half, drawn[..., :WATCH] - p, 0.0).sum(axis=(0, 1))
        assert (np.abs(error) < 4.5 * np.sqrt(np.where(half, p * (1 - p), 0.0).sum(axis=(0, 1)))).all()


def test_feedback_can_be_what_is_expected(make, crowd):
    state, slates, expected, _, sampled = crowd
    result, after = step(KEY, state, slates, make("expected").default_params)
    np.testing.assert_allclose(result.exposure.feedback, expected, rtol=1e-5)
    np.testing.assert_array_equal(result.terminated, sampled.terminated)  # leaving is drawn all the same
    assert np.abs(np.asarray(after.memory.outer)).max() > 0


def test_wrong_arguments_are_named(make, log, items, model):
    with pytest.raises(ValueError, match="answers 'mean'"):
        make("mean")
    empty = random_logs.make_log(0, 0, scores=False, spec=tiny.SPEC)
    with pytest.raises(ValueError, match="the log has none"):
        learned.make_learned_env(model, items, CONFIG, empty, MAX)


def test_long_logs_are_cut(make, log):
    """To whole sessions, in arrays whose sizes hang on the limit alone."""
    for limit in (20, 21):
        pool = make(pool_requests=limit).default_params.pool
        sessions = int(np.flatnonzero(log.offsets <= limit)[-1])
        sessions = min(sessions, 5)  # one session to every four requests
        assert pool.num_sessions == sessions and pool.num_requests == log.offsets[sessions] <= limit
        assert pool.user_id.shape == (5,) and pool.first.shape == (6,) and pool.candidates.shape == (limit, C)
        np.testing.assert_array_equal(pool.candidates[: log.offsets[sessions]], log.candidates[: log.offsets[sessions]])
        np.testing.assert_array_equal(pool.first[: sessions + 1], log.offsets[: sessions + 1])


@pytest.mark.parametrize(
    "encoder", ["memory", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gru", "transformer"))]
)
def test_simulator_and_training_have_the_same_states(encoder, log, items):
    """Carries and predictions after each slate, against those of the same requests as a batch."""
    config = dataclasses.replace(CONFIG, encoder=encoder, window=2)
    model = tiny.make_feedback_model(config)
    sim = learned.make_learned_env(model, items, config, log, MAX)
    request, history, state = reset(KEY, sim.default_params, IDS, 0)
    requests, slates, exposures, states = [request], [], [], [state]
    for t in range(2):
        slates.append(random_slates(t))
        result, state = step(KEY, state, slates[-1], sim.default_params)
        requests.append(result.request)
        exposures.append(result.exposure)
        states.append(state)

    def stack(x):
        return np.stack([np.asarray(i) for i in x], axis=1)

    nothing = np.zeros((B, K, S), np.float32)
    batch = types.SessionBatch(
        user_id=request.user_id,
        date=np.zeros(len(request.user_id), np.int32),
        profile=request.profile,
        history=history,
        context=stack([r.context for r in requests]),
        candidates=stack([r.candidates for r in requests]),
        slate=stack([*slates, slates[0]]),
        slate_mask=stack([*(x.mask for x in exposures), np.ones((B, K), bool)]),
        feedback=stack([*(x.feedback for x in exposures), nothing]),
        log_propensity=np.zeros((B, 3), np.float32),
        mask=np.ones((B, 3), bool),
        terminated=np.zeros((B, 3), bool),
        truncated=np.zeros((B, 3), bool),
    )

    @jax.jit
    def trained(state):
        r = network.encode_batch(config, state, batch, items)
        return r, network.predict(config, state.params, r.z, r.memory_mean, r.shown)

    r, out = trained(model)
    for t in range(3):
        of_batch = jax.tree.map(lambda x, t=t: np.moveaxis(np.asarray(x)[:, :, t], 0, 1), r.carry)
        same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(same, states[t].memory, of_batch)
        videos = np.take_along_axis(batch.candidates[:, t], batch.slate[:, t], axis=1)
        served = predict(sim.default_params, states[t], videos)
        assert close(served, jax.tree.map(lambda x, t=t: x[:, :, t], out)), t
    assert np.abs(np.asarray(out.feedback[:, :, 0] - out.feedback[:, :, 1])).max() > 0.01


def test_runs_in_rollouts_whatever_the_slots(sim, items):
    """Slots refilled many times, and users side by side: the same sums."""
    weight = jnp.asarray(np.random.default_rng(0).normal(size=items.num_videos), jnp.float32)

    def score(params, carry, request):
        return params[request.candidates] + 0.1 * request.context[:, :1]

    policy = rankers.Ranker(weight, lambda *_: (), score, lambda *_: ())

    @functools.partial(jax.jit, static_argnums=0)
    def run(slots, key):
        return rollout.rollout(sim, policy, key, 0, 0, num_users=40, slots=slots)

    (few, counts), (many, other_counts) = run(8, KEY), run(64, KEY)
    np.testing.assert_allclose(few, many, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(counts, other_counts)
    requests = np.asarray(few)[:, rollout.user_metrics(SHORT_VIDEO).index("requests")]
    assert requests.min() >= 1 and requests.max() == MAX
    depth = np.asarray(few)[:, rollout.user_metrics(SHORT_VIDEO).index("depth")]
    assert counts.sum() == depth.sum() and (requests <= depth).all() and (depth < K * requests).any()
