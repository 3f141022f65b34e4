"""`reset` and `step` of environments against the functions that they are a layer on, and the protocol's invariants."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import mmrf_jax as mmrf
from mmrf_jax import signals, types
from mmrf_jax.envs import environment, registry
from mmrf_jax.envs.short_video import env as world
from mmrf_jax.envs.short_video import environment as short_video
from mmrf_jax.envs.short_video import parameters

C, K, H, T, B = 20, 3, 8, 4, 32
CONFIG = parameters.WorldConfig(num_videos=3000, candidates=C, slate=K, history=H, max_requests=T)
KEY, IDS = jax.random.key(3), jnp.arange(100, 100 + B)
WATCH = signals.SHORT_VIDEO.index("watch_time")


@pytest.fixture(scope="module")
def env():
    return mmrf.make("short-video", num_videos=3000, num_candidates=C, slate_size=K, history_size=H, max_requests=T)


@pytest.fixture(scope="module")
def calls(env):
    return env.reset, env.step


def slates(step, users=B):
    return np.random.default_rng(step).random((users, C)).argsort(axis=1)[:, :K].astype(np.int32)


@pytest.fixture(scope="module")
def played(env, calls):
    """What `reset` and each `step` returned, two steps past the longest session."""
    reset, step = calls
    obs, state = reset(KEY, env.default_params, IDS)
    seen = [(obs, state, *[None] * 4)]
    for t in range(T + 2):
        seen.append(step(KEY, seen[-1][1], slates(t), env.default_params))
    return jax.tree.map(np.asarray, seen)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
    """Equal but for the rounding of another program."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), a, b)


def test_shapes_and_specs(env, played):
    assert env.num_candidates == C and env.slate_size == K and env.signals is signals.SHORT_VIDEO
    for obs, *_ in played:
        jax.tree.map(
            lambda spec, x: spec.contains(x) or pytest.fail(f"{x} is not in {spec}"), env.observation_spec, obs
        )
    assert env.observation_spec.features.shape == (C, parameters.LATENT + 8)
    assert env.observation_spec.history.feedback.shape == (H, len(env.signals))
    assert env.action_spec.contains(slates(0)) and not env.action_spec.contains(slates(0) + C)
    assert not env.action_spec.contains(slates(0)[:, :-1])
    _, _, reward, terminated, truncated, info = played[1]
    assert reward.shape == terminated.shape == truncated.shape == (B,) and reward.dtype == np.float32
    assert terminated.dtype == truncated.dtype == bool and info["feedback"].shape == (B, K, len(env.signals))


def test_sessions_are_those_of_the_hot_path(played):
    """Feedback, requests and ends are those of `reset_env` and `step_env`, as long as sessions last."""
    sim = world.make_world(CONFIG)
    reset, step = jax.jit(sim.reset_env), jax.jit(sim.step_env)
    request, history, state = reset(KEY, sim.default_params, IDS, 0)
    live = np.ones(B, bool)
    np.testing.assert_array_equal(played[0][0].history.videos, history.videos)
    assert not played[0][0].exposure.mask.any()
    window = np.asarray(history.videos)
    for t in range(T):
        obs, _, reward, terminated, truncated, info = played[t + 1]
        np.testing.assert_array_equal(played[t][0].candidates[live], np.asarray(request.candidates)[live])
        expected = sim.items.features[played[t][0].candidates]
        np.testing.assert_array_equal(played[t][0].features, expected)
        result, state = step(KEY, state, slates(t), sim.default_params)
        feedback = np.asarray(result.exposure.feedback)
        assert_close(info["feedback"][live], feedback[live])
        assert_close(reward[live], feedback[live, :, WATCH].sum(axis=1))
        np.testing.assert_array_equal(terminated[live], np.asarray(result.terminated)[live])
        np.testing.assert_array_equal(truncated[live], np.asarray(result.truncated)[live])
        window = np.concatenate([window[:, K:], np.asarray(result.exposure.videos)], axis=1)
        np.testing.assert_array_equal(obs.history.videos[live], window[live])
        np.testing.assert_array_equal(obs.exposure.videos[live], window[live, -K:])
        live &= ~(terminated | truncated)
        request = result.request
    assert not live.any()


def test_nothing_changes_after_the_end(played):
    lengths = []
    for before, after in itertools.pairwise(played[1:]):
        over = before[3] | before[4]
        lengths.append(over.sum())
        rows = functools.partial(jax.tree.map, lambda x, over=over: x[over])
        assert_equal(rows(after[:2]), rows(before[:2]))
        assert (after[2][over] == 0).all() and not after[5]["feedback"][over].any() and not after[5]["mask"][over].any()
        np.testing.assert_array_equal(after[3][over], before[3][over])
        np.testing.assert_array_equal(after[4][over], before[4][over])
        assert (after[2][~over] > 0).all()
    assert 0 < lengths[0] < B and lengths[-1] == B and played[-1][3].any() and played[-1][4].any()


def test_the_key_and_the_user_alone_matter(env, calls, played):
    reset, step = calls
    order = np.random.default_rng(1).permutation(B)
    obs, state = reset(KEY, env.default_params, IDS[order])
    after = step(KEY, state, slates(0)[order], env.default_params)
    assert_close(
        (obs, after[0], after[2:]), jax.tree.map(lambda x: x[order], (played[0][0], played[1][0], played[1][2:]))
    )
    again = step(KEY, played[0][1], slates(0), env.default_params)
    assert_equal(again, played[1])
    other = step(jax.random.key(4), played[0][1], slates(0), env.default_params)
    assert (np.asarray(other[2]) != played[1][2]).all()


def test_vmap_over_keys_and_scan(env, played):
    @jax.jit
    def run(key):
        def step(carry, slate):
            obs, state = carry
            obs, state, *rest = env.step(key, state, slate, env.default_params)
            return (obs, state), rest

        return jax.lax.scan(step, env.reset(key, env.default_params, IDS), np.stack([slates(t) for t in range(T)]))

    keys = jnp.stack([KEY, jax.random.key(9)])
    (obs, _), (reward, *_) = jax.jit(jax.vmap(run))(keys)
    assert_close(obs.history.feedback[0], played[T][0].history.feedback)
    assert_close(reward[0], np.stack([x[2] for x in played[1 : T + 1]]))
    state = env.reset(keys[1], env.default_params, IDS)[1]
    for t in range(T):
        _, state, expected, *_ = env.step(keys[1], state, slates(t), env.default_params)
        assert_close(reward[1, t], expected)
    assert (np.asarray(reward[0]) != np.asarray(reward[1])).any(axis=0).all()


def test_slates_that_cannot_be_shown():
    """Entries out of range or repeated are left out; the first candidates that are not in the slate fill the end."""
    given = jnp.array([[4, 0, 2], [3, 3, 99], [-1, 0, 0], [0, 2, 0], [1, 7, 0], [5, 5, 5]])
    shown, invalid = environment._valid(given, 7)
    np.testing.assert_array_equal(shown, [[4, 0, 2], [3, 0, 1], [0, 1, 2], [0, 2, 1], [1, 0, 2], [5, 0, 1]])
    np.testing.assert_array_equal(invalid, [0, 2, 2, 1, 1, 2])


def test_repeats_do_not_earn_twice(env, calls):
    reset, step = calls
    state = reset(KEY, env.default_params, IDS)[1]
    repeated = step(KEY, state, jnp.full((B, K), 5), env.default_params)
    assert (np.asarray(repeated[5]["invalid"]) == K - 1).all()
    expected = step(KEY, state, jnp.tile(jnp.array([5, 0, 1]), (B, 1)), env.default_params)
    assert_equal(repeated[:5], expected[:5])


@pytest.mark.parametrize(
    ("num_candidates", "slate_size"),
    [(7, 6), (1, 1), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(3, 3, marks=pytest.mark.slow)],
)
def test_other_sizes(num_candidates, slate_size):
    env = mmrf.make(
        "short-video", num_videos=3000, num_candidates=num_candidates, slate_size=slate_size, history_size=2
    )
    obs, state = env.reset(KEY, env.default_params, IDS[:4])
    assert [len(set(row)) for row in obs.candidates.tolist()] == [num_candidates] * 4
    slate = jnp.tile(jnp.arange(slate_size), (4, 1))
    obs, *_, info = jax.eval_shape(env.step, KEY, state, slate, env.default_params)
    assert obs.history.videos.shape == (4, 2) and info["feedback"].shape == (4, slate_size, len(env.signals))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_candidates": 4}, "num_candidates=4 must lie between slate_size=6 and num_videos=100000"),
        ({"num_videos": 700}, r"num_videos=700 leaves a topic with \d+ videos, but num_candidates=100 needs"),
        ({"slate_size": 0}, "slate_size is 0; use 1 or more"),
        ({"history_size": 2.5}, "history_size is 2.5; use a whole number"),
        ({"variant": "leaving"}, "unknown variant='leaving'; choose among base, users, exit_hazard, sparse"),
    ],
)
def test_sizes_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        mmrf.make("short-video", **arguments)
    assert "\n" not in str(caught.value)


def test_variants_are_the_worlds():
    behaviours = {
        v: short_video.make_short_video(3000, 20, 3, variant=v).default_params.behaviour for v in short_video.VARIANTS
    }
    assert behaviours["exit_hazard"] == parameters.behaviour("exit_hazard")
    assert behaviours["users"] == parameters.behaviour("users") and behaviours["base"] == parameters.Behaviour()
    assert behaviours["sparse"] == parameters.behaviour("sparse")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda env, reset, state: env.reset(jax.random.PRNGKey(0), env.default_params, IDS), "key is uint32 of shape"),
        (lambda env, reset, state: env.reset(0, env.default_params, IDS), "key is int of shape"),
        (lambda env, reset, state: env.reset(KEY, env.default_params, 5), r"user_ids has shape \(\) and dtype int32"),
        (lambda env, reset, state: env.reset(KEY, env.default_params, jnp.ones(3)), "user_ids .* dtype float32"),
        (lambda env, reset, state: env.step(KEY, state, jnp.arange(K), env.default_params), r"slate has shape \(3,\)"),
        (
            lambda env, reset, state: env.step(KEY, state, jnp.ones((B, K)), env.default_params),
            "slate .* dtype float32",
        ),
    ],
)
def test_arguments_that_cannot_be(env, played, call, message):
    with pytest.raises(ValueError, match=message):
        call(env, None, played[0][1])


def test_unknown_names_and_arguments():
    with pytest.raises(ValueError, match="unknown environment 'short_video'; did you mean short-video"):
        mmrf.make("short_video")
    with pytest.raises(
        TypeError, match="'short-video': got an unexpected keyword argument 'slate'; its arguments are num_v"
    ):
        mmrf.make("short-video", slate=3)
    with pytest.raises(TypeError, match="'learned': missing a required argument: 'run'"):
        mmrf.make("learned")


@struct.dataclass
class StubbornParams:
    items: types.Items
    seconds: float = 10.0


class Stubborn(environment.Environment):
    """Users watch each video for ten times its id in seconds, and leave after as many slates as their own id.

    Sessions end at three slates, and every request has the candidates 0 … 4.
    """

    def request(self, state):
        user = state["user"]
        context = jnp.log1p(state["position"].astype(jnp.float32))[:, None]
        return types.Request(user, context, context, jnp.tile(jnp.arange(5), (user.shape[0], 1)))

    def reset_env(self, key, params, user_ids, day):
        state = {"user": user_ids, "position": jnp.zeros_like(user_ids)}
        shape = (user_ids.shape[0], 2)
        empty = types.Exposure(jnp.zeros(shape, jnp.int32), jnp.zeros((*shape, 9)), jnp.zeros(shape, bool))
        return self.request(state), empty, state

    def step_env(self, key, state, slate, params):
        feedback = jnp.zeros((*slate.shape, 9)).at[..., WATCH].set(params.seconds * slate)
        state = state | {"position": state["position"] + 1}
        leaves = state["position"] >= state["user"]
        shown = types.Exposure(slate, feedback, jnp.ones(slate.shape, bool))
        ends = leaves, ~leaves & (state["position"] == 3)
        return environment.StepResult(shown, self.request(state), *ends), state

    def next_visit(self, key, state, params):
        return jnp.ones_like(state["user"])


def stubborn():
    zeros = np.zeros(5, np.int32)
    items = types.Items(zeros, zeros, zeros + 1.0, np.eye(5, dtype=np.float32), zeros, 1, 1, 1)
    return Stubborn(StubbornParams(items), signals.SHORT_VIDEO, 2)


def test_an_environment_of_ones_own(monkeypatch):
    """By hand: slates [4, 1] earn 50 s; users 0 and 1 leave after one, user 2 after two, user 9 stays for all three."""
    monkeypatch.setattr(registry.ENVIRONMENTS, "entries", dict(registry.ENVIRONMENTS.entries))
    mmrf.register_env("stubborn", stubborn)
    env = mmrf.make("stubborn")
    params, users = env.default_params, jnp.array([0, 2, 9])
    obs, state = env.reset(KEY, params, users)
    np.testing.assert_array_equal(obs.features, [np.eye(5)] * 3)
    seen = []
    for _ in range(4):
        obs, state, reward, terminated, truncated, _ = env.step(KEY, state, jnp.array([[4, 1]] * 3), params)
        seen.append([reward.tolist(), terminated.tolist(), truncated.tolist()])
    no, yes = False, True
    assert seen == [
        [[50, 50, 50], [yes, no, no], [no, no, no]],
        [[0, 50, 50], [yes, yes, no], [no, no, no]],
        [[0, 0, 50], [yes, yes, no], [no, no, yes]],
        [[0, 0, 0], [yes, yes, no], [no, no, yes]],
    ]
    twice = params.replace(seconds=20.0)
    assert env.step(KEY, env.reset(KEY, params, users)[1], jnp.array([[4, 1]] * 3), twice)[2].tolist() == [100] * 3
    found = mmrf.rollout(env, lambda key, obs: jnp.array([[0.0, 4.0, 1.0, 2.0, 5.0]]), num_users=5, key=KEY)
    np.testing.assert_array_equal(found["watch_time"], [50, 50, 100, 150, 150])
    np.testing.assert_array_equal(found["depth"], [2, 2, 4, 6, 6])
    np.testing.assert_array_equal(found["truncated"], [0, 0, 0, 0, 1])


def test_registering(monkeypatch, env):
    monkeypatch.setattr(registry.ENVIRONMENTS, "entries", dict(registry.ENVIRONMENTS.entries))

    def mine(size: int):
        return env if size == 2 else None

    mmrf.register_env("mine", mine)
    mmrf.register_env("mine", mine)
    assert mmrf.make("mine", size=2) is env
    with pytest.raises(ValueError, match="an environment named 'mine' is registered already"):
        mmrf.register_env("mine", lambda: env)
    with pytest.raises(TypeError, match="environment 'none' is 3; give a function that returns an Environment"):
        mmrf.register_env("none", 3)
