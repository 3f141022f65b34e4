"""Rollouts: what happens to a user hangs on the key and the user alone, and logs hold what happened."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax import random, types
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.envs import collect, rankers, rollout
from mmrf_jax.envs.short_video import env, parameters, reference_policies
from mmrf_jax.signals import SHORT_VIDEO

CONFIG = parameters.WorldConfig(num_videos=3000, candidates=20, slate=3, history=4, max_requests=6)
C, K, N, SESSIONS = CONFIG.candidates, CONFIG.slate, 600, 150
COLUMN = {name: i for i, name in enumerate(rollout.user_metrics(SHORT_VIDEO))}

arrive = jax.jit(env.reset)

# A ranker that looks at everything that a refilled slot must get anew: the history, and what was observed since.


def remember(params, request, history):
    return history.feedback[..., SHORT_VIDEO.index("watch_time")].mean(axis=1)


def rank(params, carry, request):
    features = params["features"][request.candidates]
    return (
        features @ params["weight"] + 0.1 * jnp.sin(carry)[:, None] * features[..., 0] + 0.01 * request.context[:, 2:]
    )


def observe(params, carry, request, shown):
    return 0.9 * carry + shown.feedback[..., SHORT_VIDEO.index("watch_time")].mean(axis=1)


@pytest.fixture(scope="module")
def sim():
    return env.make_world(CONFIG)


@pytest.fixture(scope="module")
def policy(sim):
    weight = jnp.linspace(-1.0, 1.0, parameters.LATENT + 8)
    return rankers.Ranker({"features": sim.items.features, "weight": weight}, remember, rank, observe, temperature=1.0)


@pytest.fixture(scope="module")
def serve(sim, policy):
    """serve(key, first_user, day) -> sums [N, M] and exposure counts [G, V]; slots are refilled many times over."""

    @jax.jit
    @chex.assert_max_traces(n=1)  # whatever the key, user or day
    def run(key, first_user, day):
        return rollout.rollout(sim, policy, key, first_user, day, num_users=N, slots=64)

    chex.clear_trace_counter()
    return lambda key=0, first_user=0, day=0: jax.tree.map(np.asarray, run(jax.random.key(key), first_user, day))


@pytest.fixture(scope="module")
def plain(sim, policy):
    """plain(key, first_user, day) -> sums [N, M] by a loop without queue, refills or slots: everyone side by side."""

    @jax.jit
    def turn(key, state, request, carry, day):
        position = jnp.broadcast_to(day * 4096 + state.position, request.user_id.shape)
        scores = policy.score(policy.params, carry, request)
        u = random.reference_per_user_uniform(jax.random.fold_in(key, 4), position, request.user_id, C)
        slate = jax.lax.top_k(scores + random.to_gumbel(u), K)[1]
        result, state = sim.step_env(key, state, slate, sim.default_params)
        carry = policy.observe(policy.params, carry, request, result.exposure)
        return state, result, carry, sim.next_visit(key, state, sim.default_params)

    def run(key=0, first_user=0, day=0):
        key = jax.random.key(key)
        request, history, state = arrive(key, sim.default_params, first_user + jnp.arange(N), day)
        carry, here = policy.start(policy.params, request, history), np.ones(N, bool)
        sums = np.zeros((N, len(rollout.user_metrics(SHORT_VIDEO))))
        while here.any():
            state, result, carry, days = turn(key, state, request, carry, day)
            request, feedback = result.request, np.asarray(result.exposure.feedback, np.float64).sum(axis=1)
            over = np.asarray(result.terminated | result.truncated)
            tags = np.asarray(sim.items.tag)[np.asarray(result.exposure.videos)]
            pairs = [(i, j) for i in range(K) for j in range(i)]
            row = {s: feedback[:, i] for i, s in enumerate(SHORT_VIDEO.names)}
            row |= {"depth": K, "requests": 1, "truncated": np.asarray(result.truncated)}
            row |= {"returned": over & (np.asarray(days) == 1), "next_visit": over * np.asarray(days)}
            row |= {"ild": np.mean([tags[:, i] != tags[:, j] for i, j in pairs], axis=0)}
            for name, i in COLUMN.items():
                sums[here, i] += np.broadcast_to(row[name], N)[here]
            here &= ~over
        return sums

    return run


def assert_same_sums(a, b):
    """Equal but for float rounding; of the slates of N sessions none may differ, where one in 10^5 might."""
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


class TestRollout:
    def test_who_else_is_in_the_queue_does_not_matter(self, serve):
        """Users 200 … 799 alone, and in a queue that begins with others."""
        whole, later = serve(first_user=0)[0], serve(first_user=200)[0]
        assert_same_sums(later[: N - 200], whole[200:])
        assert np.abs(later[:100] - whole[:100]).max() > 1  # other users, other sums

    def test_a_choice_among_policies_serves_as_the_chosen_one(self, sim, policy, serve):
        """One program for policies with and without a carry, deterministic or not, that see hidden truth or do not."""
        policies = {"mine": policy, "oracle": rankers.PrivilegedPolicy(reference_policies.oracle_myopic, 0.0)}
        run = jax.jit(lambda policy: rollout.rollout(sim, policy, jax.random.key(0), 0, 0, num_users=N, slots=64)[0])
        chosen = {name: np.asarray(run(choice)) for name, choice in rankers.choices(policies).items()}
        assert run._cache_size() == 1
        assert_same_sums(chosen["mine"], serve()[0])
        assert_same_sums(chosen["oracle"], np.asarray(run(policies["oracle"])))

    def test_a_queue_of_any_ids_in_more_slots_than_users(self, sim, policy, serve):
        """Ids in any order, fewer than there is room for: everybody's sums and exposures as in a queue of all.

        Nor does the number of slots matter: here none is refilled.
        """
        rng = np.random.default_rng(0)
        ids = rng.permutation(N)[:250]
        users = np.concatenate([ids, np.zeros(50)]).astype(np.int32)
        run = functools.partial(rollout.rollout, sim, policy, num_users=300, slots=512)
        sums, counts = jax.jit(lambda users, queue: run(jax.random.key(0), users, 0, queue=queue))(users, 250)
        whole = serve()[0]
        assert_same_sums(sums[:250], whole[ids])
        np.testing.assert_array_equal(sums[250:], 0)
        group = np.asarray(rollout.exposure_group(jnp.asarray(ids)))
        expected = np.bincount(group, weights=whole[ids, COLUMN["depth"]], minlength=rollout.EXPOSURE_GROUPS)
        np.testing.assert_array_equal(counts.sum(axis=1), expected)

    def test_everyone_is_followed_to_the_end(self, serve, plain):
        """No length bias: every sum of every user is that of a plain loop, so the means are."""
        sums, expected = serve(key=3, first_user=50, day=2)[0], plain(key=3, first_user=50, day=2)
        assert_same_sums(sums, expected)
        np.testing.assert_array_equal(sums[:, COLUMN["requests"]], expected[:, COLUMN["requests"]])
        assert sums[:, COLUMN["requests"]].mean() > 2
        assert (sums[:, COLUMN["requests"]] >= 1).all()

    def test_sums_agree_with_each_other(self, serve):
        sums, counts = serve()
        column = {name: sums[:, i] for name, i in COLUMN.items()}
        assert counts.shape == (rollout.EXPOSURE_GROUPS, CONFIG.num_videos)
        assert counts.sum() == K * column["requests"].sum()
        group = np.asarray(rollout.exposure_group(jnp.arange(N)))
        groups = np.bincount(group, weights=K * column["requests"], minlength=rollout.EXPOSURE_GROUPS)
        np.testing.assert_array_equal(counts.sum(axis=1), groups)
        np.testing.assert_array_equal(column["depth"], K * column["requests"])
        cut = column["truncated"] == 1
        assert 0 < cut.mean() < 1 and set(np.unique(column["truncated"])) == {0, 1}
        np.testing.assert_array_equal(column["requests"][cut], CONFIG.max_requests)
        assert (column["long_view"] <= column["depth"]).all() and (column["click"] <= column["depth"]).all()
        np.testing.assert_array_equal(column["returned"], column["next_visit"] == 1)
        assert set(np.unique(column["returned"])) == {0, 1} and column["next_visit"].max() <= 30
        assert (column["ild"] <= column["requests"]).all()

    def test_keys_and_days_matter(self, serve):
        sums = serve()[0]
        for other in (serve(key=1)[0], serve(day=1)[0]):
            assert (np.abs(other - sums).max(axis=1) > 0.1).mean() > 0.9

    def test_sampling_noise_is_new_every_day(self, sim):
        """Equal scores, so a slate is its noise alone."""
        policy = rankers.PrivilegedPolicy(reference_policies.random, 1.0)
        go = jax.jit(lambda day: rollout.step_slots(sim, policy, jax.random.key(0), day, begin(day))[1].slate)

        def idle(day):
            return rollout.idle(sim, policy, jax.random.key(0), 0, 64, day, 64, True)

        def begin(day):
            return rollout.refill(sim, policy, jax.random.key(0), day, idle(day))

        assert (go(0) != go(1)).any(axis=1).mean() > 0.9


@pytest.fixture(scope="module")
def act():
    """act(temperature, scores [C], n) -> slates [n, K] and log-probabilities [n] of n users with equal scores."""

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def run(temperature, scores, n):
        shown = jnp.broadcast_to(scores, (n, scores.shape[0]))
        policy = rankers.Ranker(shown, None, lambda params, carry, request: params, None, temperature)
        users = jnp.arange(n, dtype=jnp.int32)
        request = types.Request(users, None, None, None)
        return rollout.select_slate(
            policy, None, None, None, request, request.user_id, jnp.zeros(n, jnp.int32), jax.random.key(0), K
        )[1:]

    return lambda *args: jax.tree.map(np.asarray, run(*args))


class TestAct:
    def test_hard_top_k(self, act):
        slate, log_propensity = act(0.0, jnp.array([0.3, 2.0, -1.0, 2.0, 0.7]), 4)
        np.testing.assert_array_equal(slate, [[1, 3, 4]] * 4)
        np.testing.assert_array_equal(log_propensity, 0.0)

    def test_plackett_luce_frequencies(self, act):
        """Frequencies of the first slot and of whole slates are the analytic ones, at a temperature other than 1."""
        n, scores, temperature = 100_000, np.array([0.0, 1.0, -0.5, 0.4]), 0.5
        slate, log_propensity = act(temperature, jnp.asarray(scores), n)
        weight = np.exp(scores / temperature)
        first = weight / weight.sum()
        np.testing.assert_allclose(np.bincount(slate[:, 0], minlength=4) / n, first, atol=4 * 0.5 / n**0.5)
        slates, index, counts = np.unique(slate, axis=0, return_index=True, return_counts=True)
        assert len(slates) == 24  # every ordered slate of 3 of 4
        probability = np.exp(log_propensity[index])
        np.testing.assert_allclose(probability.sum(), 1.0, rtol=1e-5)
        error = np.sqrt(probability * (1 - probability) / n)
        assert (np.abs(counts / n - probability) < 4.5 * error).all()


@pytest.fixture(scope="module")
def log(sim, policy):
    done = []
    log = collect.collect(
        sim,
        policy,
        jax.random.key(0),
        first_user=0,
        num_sessions=SESSIONS,
        day=0,
        keep_scores=True,
        progress=done.append,
    )
    assert done == sorted(done) and done[-1] == SESSIONS
    return log


class TestCollect:
    def test_fits_its_spec(self, sim, log):
        items = sim.items
        spec = InputSpec(
            num_videos=items.num_videos,
            num_authors=items.num_authors,
            num_tags=items.num_tags,
            num_users=0,
            item_features=parameters.LATENT + 8,
            profile=parameters.PROFILE,
            context=parameters.CONTEXT,
            candidates=C,
            slate=K,
            history=CONFIG.history,
        )
        log.validate(spec)
        assert log.num_sessions == SESSIONS and log.offsets[0] == 0 and log.offsets[-1] == log.num_requests
        np.testing.assert_array_equal(log.user_id, np.arange(SESSIONS))
        np.testing.assert_array_equal(log.date, 0)

    def test_requests_are_in_order(self, sim, log):
        """The context holds the log of the position: 0, 1, 2 … in each session."""
        for start, stop in zip(log.offsets[:-1], log.offsets[1:], strict=True):
            np.testing.assert_allclose(np.expm1(log.context[start:stop, 2]), np.arange(stop - start), atol=1e-4)
        profile = arrive(jax.random.key(0), sim.default_params, jnp.arange(N), 0)[0].profile
        np.testing.assert_allclose(log.profile, profile[:SESSIONS], atol=1e-4)

    def test_totals_are_those_of_the_rollout(self, log, serve):
        """Same key and users: the same sessions, user by user."""
        sums = serve()[0][:SESSIONS]

        def total(x):
            return np.add.reduceat(x, log.offsets[:-1])

        for i, signal in enumerate(SHORT_VIDEO.names):
            np.testing.assert_allclose(total(log.feedback[..., i].sum(axis=1)), sums[:, COLUMN[signal]], rtol=1e-4)
        requests = np.diff(log.offsets)
        np.testing.assert_array_equal(requests, sums[:, COLUMN["requests"]])
        np.testing.assert_array_equal(log.truncated, sums[:, COLUMN["truncated"]])
        np.testing.assert_array_equal(log.terminated, ~log.truncated)
        assert 0 < log.truncated.sum() < SESSIONS and (requests[log.truncated] == CONFIG.max_requests).all()

    def test_propensities_in_float64(self, log):
        """log Π_j exp(s_j) / Σ of what is left, from the logged scores."""
        expected = []
        for scores, slate in zip(log.scores.astype(np.float64), log.slate, strict=True):
            left, total = list(range(C)), 0.0
            for video in slate:
                total += scores[video] - np.log(np.exp(scores[left]).sum())
                left.remove(video)
            expected.append(total)
        np.testing.assert_allclose(log.log_propensity, expected, rtol=1e-4, atol=1e-4)
        assert np.std(expected) > 0.1

    def test_scores_are_those_of_what_was_observed(self, sim, log, policy):
        """The scores of a session follow from its history and the feedback logged before each request."""
        params = jax.tree.map(np.asarray, policy.params)
        for n in range(5):
            carry = log.history_feedback[n, :, SHORT_VIDEO.index("watch_time")].mean()
            for r in range(log.offsets[n], log.offsets[n + 1]):
                features = params["features"][log.candidates[r]]
                expected = features @ params["weight"] + 0.1 * np.sin(carry) * features[:, 0] + 0.01 * log.context[r, 2]
                np.testing.assert_allclose(log.scores[r], expected, rtol=1e-3, atol=1e-3)
                carry = 0.9 * carry + log.feedback[r, :, SHORT_VIDEO.index("watch_time")].mean()

    def test_traces_once(self, sim, policy, log):
        before = rollout.unroll._cache_size(), rollout.reset_slots._cache_size()
        other = collect.collect(sim, policy, jax.random.key(9), first_user=77, num_sessions=SESSIONS, day=4)
        assert (rollout.unroll._cache_size(), rollout.reset_slots._cache_size()) == before
        assert other.scores is None and other.user_id[0] == 77 and (other.date == 4).all()


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.envs import rankers, rollout
from mmrf_jax.envs.short_video import env, parameters, reference_policies
from mmrf_jax.signals import SHORT_VIDEO

sim = env.make_world(parameters.WorldConfig(num_videos=3000, candidates=20, slate=3, history=4, max_requests=6))
policy, key, n = rankers.PrivilegedPolicy(reference_policies.production, 1.0), jax.random.key(0), 60

def serve(users, slots, params, key, first):
    world = sim.replace(default_params=params)
    sums, counts = rollout.rollout(world, policy, key, first[0], 0, num_users=users, slots=slots)
    return sums, counts

partitioner = Partitioner()
assert partitioner.num_devices == 4
here = lambda params, key, first: serve(n, 16, params, key, first)
first = partitioner.shard_inputs(100 + n * np.arange(4, dtype=np.int32))
sums, counts = jax.jit(partitioner.shard_users(here, num_replicated=2))(sim.default_params, key, first)
alone, alone_counts = jax.jit(lambda *x: serve(4 * n, 64, *x))(sim.default_params, key, jnp.array([100], jnp.int32))
assert sums.shape == (4 * n, len(rollout.user_metrics(sim.signals))) and len(sums.sharding.device_set) == 4
np.testing.assert_allclose(sums, alone, rtol=1e-4, atol=1e-3)
counts = np.asarray(counts).reshape(4, rollout.EXPOSURE_GROUPS, -1)
np.testing.assert_array_equal(counts.sum(axis=(0, 1)), np.asarray(alone_counts).sum(axis=0))
print("all well")
"""


def test_four_devices_serve_as_one(run_python):
    assert "all well" in run_python(SHARDED, devices=4)
