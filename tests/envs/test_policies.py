"""`mmrf.rollout` against a plain loop over the public environment, for every kind of policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import mmrf_jax as mmrf
from mmrf_jax.envs import policies, rankers
from mmrf_jax.envs import rollout as rollouts
from mmrf_jax.envs.short_video import reference_policies

C, K, T, N = 20, 3, 4, 40
KEY = jax.random.key(2)


@pytest.fixture(scope="module")
def env():
    return mmrf.make("short-video", num_videos=3000, num_candidates=C, slate_size=K, history_size=8, max_requests=T)


@pytest.fixture(scope="module")
def calls(env):
    return env.reset, env.step


def by_features(key, obs):
    """Looks at every part of an observation that changes."""
    seconds = obs.history.feedback[..., -1].mean(axis=1) + obs.exposure.feedback[..., -1].sum(axis=1)
    return obs.features[..., 0] * jnp.sin(seconds)[:, None] + obs.features[..., 1] + obs.context[:, 2:]


@struct.dataclass
class Remembering:
    """Scores by all that it was shown in the session: a carry that forgets nothing."""

    weight: jax.Array

    def init(self, obs):
        return obs.history.feedback[..., -1].mean(axis=1)

    def apply(self, key, obs, carry):
        carry = 0.9 * carry + obs.exposure.feedback[..., -1].sum(axis=1)
        return obs.features[..., 0] * jnp.sin(carry)[:, None] + self.weight * obs.features[..., 1], carry


def looped(env, calls, policy):
    """Metrics of users 0 … N - 1 by a loop over `reset` and `step`."""
    reset, step = calls
    obs, state = reset(KEY, env.default_params, jnp.arange(N))
    remembers = isinstance(policy, mmrf.Policy)
    carry = jax.jit(policy.init)(obs) if remembers else None

    @jax.jit
    def choose(obs, carry):
        scores, carry = policy.apply(KEY, obs, carry) if remembers else (policy(KEY, obs), None)
        return jax.lax.top_k(scores, K)[1], carry

    sums = {name: np.zeros(N) for name in ("watch_time", "like", "depth", "truncated")}
    for _ in range(T):
        slate, carry = choose(obs, carry)
        live = ~(np.asarray(state.terminated) | np.asarray(state.truncated))
        obs, state, reward, _, truncated, info = step(KEY, state, slate, env.default_params)
        sums["watch_time"] += np.asarray(reward)
        sums["like"] += np.asarray(info["feedback"])[..., env.signals.index("like")].sum(axis=1)
        sums["depth"] += K * live
        sums["truncated"] += live & np.asarray(truncated)
    return sums


def assert_metrics(found, expected):
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-3, err_msg=name)


def test_a_function_is_served_as_in_a_loop(env, calls):
    found, expected = mmrf.rollout(env, by_features, num_users=N, key=KEY), looped(env, calls, by_features)
    assert_metrics(found, expected)
    assert set(found) == {"user_id", *rollouts.user_metrics(env.signals)}
    assert all(x.shape == (N,) for x in found.values())
    np.testing.assert_array_equal(found["user_id"], np.arange(N))
    assert 0 < expected["truncated"].sum() < N and len(set(found["depth"])) == T


def test_a_carry_is_remembered(env, calls):
    """One program for all parameters of a policy that is a pytree."""
    policy, before = Remembering(jnp.float32(0.5)), policies._sums._cache_size()
    found = mmrf.rollout(env, policy, num_users=N, key=KEY)
    assert_metrics(found, looped(env, calls, policy))
    other = mmrf.rollout(env, Remembering(jnp.float32(-2.0)), num_users=N, key=KEY)
    assert policies._sums._cache_size() == before + 1
    assert (other["watch_time"] != found["watch_time"]).mean() > 0.5


def test_noise_is_the_users_own(env):
    """Who else is served, and in how many slots, changes no one's outcome; another key changes everybody's."""
    noisy = jax.tree_util.Partial(lambda scale, key, obs: scale * jax.random.normal(key, obs.candidates.shape), 1.0)
    serve = functools.partial(mmrf.rollout, env, noisy)
    few, many = serve(num_users=N, key=KEY), serve(num_users=3 * N, key=KEY)
    assert_metrics({name: x[:N] for name, x in many.items()}, few)
    later = serve(num_users=N, first_user=2 * N, key=KEY)
    assert_metrics({name: x[2 * N :] for name, x in many.items()}, later)
    other = serve(num_users=N, key=jax.random.key(5))
    assert (other["watch_time"] != few["watch_time"]).all()


def test_oracles_see_the_state(env):
    """The wrapper's policy is served as `envs.rollout` serves a reference policy of the same scores."""
    sums, _ = jax.jit(
        lambda: rollouts.rollout(env, env.reference_policies["oracle_myopic"], KEY, 0, 0, num_users=N, slots=16)
    )()
    expected = dict(zip(rollouts.user_metrics(env.signals), np.asarray(sums).T, strict=True))
    mine = mmrf.wrappers.oracle(reference_policies.oracle_myopic)
    assert_metrics(mmrf.rollout(env, mine, num_users=N, key=KEY), expected)


def test_a_ranker_is_served_alike_step_by_step(env, calls):
    """A `Ranker` is an `mmrf.Policy` too; it observes feedback with the request at which the videos were shown."""

    def score(weight, carry, request):
        return jnp.sin(weight * request.candidates.astype(jnp.float32) * carry[:, None])

    def observe(weight, carry, request, exposure):
        return 0.5 * carry + exposure.feedback[..., -1].mean(axis=1) + request.context[:, -1]

    def start(weight, request, history):
        return history.feedback[:, 0, -1]

    policy = rankers.Ranker(jnp.float32(0.1), start, score, observe)
    expected = mmrf.rollout(env, policy, num_users=N, key=KEY)
    assert_metrics(expected, looped(env, calls, policy))


def test_a_temperature_samples_plackett_luce(env, calls):
    """The first of a slate is drawn with the softmax of its scores."""
    obs, _ = calls[0](KEY, env.default_params, jnp.arange(4))
    wanted = np.linspace(0.0, 2.0, C, dtype=np.float32)
    ranker = rankers.Ranker(
        wanted, rankers.nothing, lambda scores, carry, request: jnp.tile(scores, (4, 1)), rankers.nothing, 0.5
    )
    draw = jax.jit(jax.vmap(lambda key: ranker.apply(key, obs, ranker.init(obs))[0].argmax(axis=1)))
    n = 5_000
    first = np.bincount(np.asarray(draw(jax.random.split(KEY, n))).ravel(), minlength=C) / (4 * n)
    weight = np.exp(wanted / 0.5)
    np.testing.assert_allclose(first, weight / weight.sum(), atol=4 * 0.5 / (4 * n) ** 0.5)


@pytest.mark.parametrize(
    ("policy", "arguments", "message"),
    [
        (by_features, {"num_users": 0}, "num_users is 0; use 1 or more"),
        (by_features, {"first_user": -1}, "users -1 … 18 are not all in"),
        (by_features, {"key": jax.random.PRNGKey(0)}, "key is uint32 of shape"),
        (lambda key, obs: obs.features, {}, r"scores of shape \(1, 20, 24\) for candidates of shape \(1, 20\)"),
        ("production", {}, "policy is 'production'; give a function"),
    ],
)
def test_rollouts_that_cannot_be(env, policy, arguments, message):
    with pytest.raises(ValueError, match=message):
        mmrf.rollout(env, policy, **{"num_users": 20, "key": KEY} | arguments)
