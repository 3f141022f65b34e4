"""The world's marginals against KuaiRand's, and the spread of its rankers.

KuaiRand's figures are those of the slice described in its README: the standard log of 2022-04-25 … 2022-05-05 (24,448
users, 180,384 rows) and the random log of 2022-04-22 … 2022-05-05 (982 users, 30,628 rows), exact duplicates dropped.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmrf_jax.envs import rankers, rollout
from mmrf_jax.envs.short_video import env, items, leaving, parameters, reference_policies, response, users
from mmrf_jax.envs.short_video.truth import truth_of
from mmrf_jax.signals import SHORT_VIDEO

pytestmark = pytest.mark.slow

QUANTILES = (0.25, 0.5, 0.75, 0.9)
STANDARD = {
    "rows": 180_384,
    "click": 0.450,
    "long_view": 0.317,
    "profile_enter": 0.0189,
    "like": 0.0175,
    "comment": 0.0026,
    "follow": 0.0013,
    "hate": 0.00085,
    "forward": 0.0008,
    "watch_time": (1.55, 4.81, 22.6, 63.5),
    "duration": (26.4, 71.4, 156.0, 259.0),
}
RANDOM = {
    "rows": 30_628,
    "click": 0.171,
    "long_view": 0.084,
    "profile_enter": 0.0045,
    "like": 0.0060,
    "hate": 0.0008,
    "forward": 0.0004,
    "follow": 0.0003,
    "comment": 0.0002,
    "watch_time": (1.32, 2.06, 4.44, 12.7),
    "duration": (28.4, 77.6, 147.0, 235.0),
}
USERS, SERVED, SLOTS, K = 8192, 4096, 1024, 6  # of the marginals, and of each ranker
UNIFORM_USERS = 166_700  # of K exposures each: a million, so that a rate of .0002 has 200 positives


@pytest.fixture(scope="module")
def sim():
    return env.make_world(parameters.WorldConfig())


@pytest.fixture(scope="module")
def serve(sim):
    """serve(ranker, world parameters) -> {column: per-user sums}; a program for sampled rankers, one for oracles."""

    def run(privileged, temperature, params, which, key):
        policy = rankers.PrivilegedPolicy(lambda *args: jax.lax.switch(which, privileged, *args), temperature)
        world = env.ShortVideoEnv(params, SHORT_VIDEO, K)
        return rollout.rollout(world, policy, key, 0, 0, num_users=SERVED, slots=SLOTS)[0]

    groups = {
        1.0: (reference_policies.production, reference_policies.random),
        0.0: (reference_policies.oracle_myopic, reference_policies.oracle_planning),
    }
    compiled = {t: jax.jit(run, static_argnums=(0, 1), compiler_options=tiny.HOT) for t in groups}

    def ask(ranker, params=sim.default_params):
        temperature = next(t for t, group in groups.items() if ranker in group)
        group = groups[temperature]
        sums = compiled[temperature](group, temperature, params, group.index(ranker), jax.random.key(0))
        return dict(zip(rollout.user_metrics(SHORT_VIDEO), np.asarray(sums, np.float64).T, strict=True))

    return ask


@pytest.fixture(scope="module")
def sums(serve):
    """{ranker: per-user sums} of the same users."""
    rankings = (
        reference_policies.random,
        reference_policies.production,
        reference_policies.oracle_myopic,
        reference_policies.oracle_planning,
    )
    return {ranker.__name__: serve(ranker) for ranker in rankings}


def per_session(sums):
    return sums["watch_time"].mean()


def per_exposure(sums):
    return sums["watch_time"].sum() / sums["depth"].sum()


@pytest.fixture(scope="module")
def standard(sim):
    """Feedback [n, S] and durations [n] of whole sessions under production."""

    @functools.partial(jax.jit, compiler_options=tiny.HOT)
    def unroll(slots, key):
        def body(slots, _):
            policy = rankers.PrivilegedPolicy(reference_policies.production, 1.0)
            slots, record, shown, _ = rollout.step_slots(sim, policy, key, 0, slots)
            return slots, (record.live, record.feedback, sim.items.duration[shown.videos])

        return jax.lax.scan(body, slots, length=sim.default_params.config.max_requests)

    key, policy = jax.random.key(1), rankers.PrivilegedPolicy(reference_policies.production, 1.0)
    idle = rollout.reset_slots(sim, policy, key, 0, USERS, 0, slots=USERS)
    _, shown = unroll(jax.jit(lambda slots: rollout.refill(sim, policy, key, 0, slots))(idle), key)
    live, feedback, duration = map(np.asarray, shown)
    return feedback[live].reshape(-1, len(SHORT_VIDEO)), duration[live].ravel()


@pytest.fixture(scope="module")
def uniform(sim):
    """Feedback [n, S] and durations [n] of slates drawn uniformly from the catalogue."""

    @functools.partial(jax.jit, compiler_options=tiny.HOT)
    def show(key):
        who, what = jax.random.split(key)
        traits, interest = users.draw(jnp.arange(UNIFORM_USERS), sim.default_params)
        videos = jax.random.randint(what, (UNIFORM_USERS, K), 0, sim.items.num_videos)
        fresh = jnp.zeros((UNIFORM_USERS, parameters.TOPICS))
        truth = response.affinity(sim.default_params, traits, interest, fresh, videos)
        u = jax.random.uniform(who, (UNIFORM_USERS, K, response.NUM_UNIFORMS), minval=1e-7)
        return response.respond(sim.default_params, traits, truth, u), truth.duration

    feedback, duration = map(np.asarray, show(jax.random.key(2)))
    return feedback.reshape(-1, len(SHORT_VIDEO)), duration.ravel()


@pytest.mark.parametrize("log, real, tolerance", [("standard", STANDARD, 0.25), ("uniform", RANDOM, 0.35)])
class TestMarginals:
    def test_rates(self, log, real, tolerance, request):
        feedback, _ = request.getfixturevalue(log)
        wrong = {}
        for i, signal in enumerate(SHORT_VIDEO.binary_names):
            ratio = feedback[:, i].mean(dtype=np.float64) / real[signal]
            frequent = real[signal] * real["rows"] >= 100
            low, high = (1 - tolerance, 1 + tolerance) if frequent else (0.5, 2.0)
            assert real[signal] * len(feedback) > 100, "too few exposures to judge by"
            if not low <= ratio <= high:
                wrong[signal] = ratio
        assert not wrong, "rates as multiples of KuaiRand's"

    def test_play_time_and_duration(self, log, real, tolerance, request):
        feedback, duration = request.getfixturevalue(log)
        for name, values in (("watch_time", feedback[:, SHORT_VIDEO.index("watch_time")]), ("duration", duration)):
            ratio = np.quantile(values, QUANTILES) / real[name]
            assert ((1 - tolerance <= ratio) & (ratio <= 1 + tolerance)).all(), (name, ratio)


class TestSpread:
    def test_random_against_production(self, sums, uniform):
        production = per_exposure(sums["production"])
        assert per_exposure(sums["random"]) <= 0.5 * production  # uniform over the candidates
        assert uniform[0][:, SHORT_VIDEO.index("watch_time")].mean() <= 0.5 * production  # uniform over the catalogue

    def test_production_against_the_myopic_oracle(self, sums):
        for value in (per_session, per_exposure):
            assert 0.65 <= value(sums["production"]) / value(sums["oracle_myopic"]) <= 0.8, value.__name__

    def test_planning_pays(self, sums):
        assert per_session(sums["oracle_planning"]) >= 1.2 * per_session(sums["oracle_myopic"])
        # It pays by keeping users, at a price for each exposure.
        assert per_exposure(sums["oracle_planning"]) < per_exposure(sums["oracle_myopic"])

    def test_sessions_are_rarely_cut(self, sums):
        assert sums["production"]["truncated"].mean() < 0.001
        assert sums["oracle_planning"]["truncated"].mean() < 0.1


def test_an_enjoyed_slate_and_a_boring_one_differ_by_about_one_in_the_log_odds_of_staying(sim):
    """The upper and the lower quarter of 16 random slates of the same request, averaged over users."""

    @jax.jit
    def stay(key):
        _, _, state = env.reset(key, sim.default_params, jnp.arange(2048), 0)
        truth = response.affinity(sim.default_params, state.traits, state.interest, state.satiation, state.candidates)

        def one(key):
            slate = jax.lax.top_k(jax.random.gumbel(key, state.candidates.shape), K)[1]
            return leaving.continue_logit(
                sim.default_params, state, jnp.take_along_axis(truth.enjoyment, slate, axis=1)
            )

        return jax.vmap(one)(jax.random.split(key, 16))

    odds = np.sort(np.asarray(stay(jax.random.key(3))), axis=0)
    assert 0.75 < np.mean(odds[-4:].mean(axis=0) - odds[:4].mean(axis=0)) < 1.5


@pytest.fixture(scope="module")
def shifted(sim):
    """Parameters of the other worlds; static fields as in `sim`, so that nothing is recompiled."""
    worlds = {v: items.make_world_params(parameters.WorldConfig(variant=v)) for v in ("users", "exit_hazard", "sparse")}
    return {v: params.replace(config=sim.default_params.config) for v, params in worlds.items()}


class TestVariants:
    def test_same_catalogue(self, sim, shifted):
        for params in shifted.values():
            same = params.replace(behaviour=sim.default_params.behaviour, topic_weight=sim.default_params.topic_weight)
            for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(sim.default_params), strict=True):
                if not jnp.issubdtype(getattr(a, "dtype", float), jax.dtypes.prng_key):
                    np.testing.assert_array_equal(a, b)

    def test_leaving_has_another_hazard(self, sums, serve, shifted):
        """Users leave earlier, and enjoyment holds them more: planning gains more over the myopic oracle."""
        params = shifted["exit_hazard"]
        production, base_world = serve(reference_policies.production, params), sums["production"]
        assert production["requests"].mean() < 0.8 * base_world["requests"].mean()
        # What a video brings is as before.
        assert per_exposure(production) == pytest.approx(per_exposure(base_world), rel=0.1)
        gain = per_session(serve(reference_policies.oracle_planning, params)) / per_session(
            serve(reference_policies.oracle_myopic, params)
        )
        assert gain > per_session(sums["oracle_planning"]) / per_session(sums["oracle_myopic"])

    def test_sparse_watch_time_says_little_and_explicit_feedback_much(self, sim, serve, shifted):
        """Of what users enjoy, on random exposures; and enjoyment is what holds them."""
        params = shifted["sparse"]

        @functools.partial(jax.jit, compiler_options=tiny.HOT)
        def sample(params):
            _, _, state = env.reset(jax.random.key(2), params, jnp.arange(512), 0)
            truth = truth_of(params, state, state.candidates)
            uniforms = jax.random.uniform(jax.random.key(3), (*truth.engagement.shape, response.NUM_UNIFORMS))
            return truth.enjoyment, response.respond(params, state.traits, truth, uniforms)

        def correlations(params):
            enjoyment, feedback = map(np.asarray, sample(params))
            columns = {name: feedback[..., i].ravel() for i, name in enumerate(SHORT_VIDEO.names)}
            columns["watch_time"] = np.log1p(columns["watch_time"])
            return {name: abs(np.corrcoef(enjoyment.ravel(), x)[0, 1]) for name, x in columns.items()}

        here, there = correlations(sim.default_params), correlations(params)
        assert there["watch_time"] < 0.5 * here["watch_time"]
        for name in ("like", "follow", "comment", "forward"):
            assert there[name] > 2.0 * here[name] and there[name] > 2.0 * there["watch_time"], name
        myopic, planning = (
            serve(ranker, params) for ranker in (reference_policies.oracle_myopic, reference_policies.oracle_planning)
        )
        assert per_session(planning) > 2.0 * per_session(myopic) and planning["truncated"].mean() < 0.1
        assert 20.0 < serve(reference_policies.production, params)["depth"].mean() < 60.0

    def test_users_are_another_mix(self, sim, sums, serve, shifted):
        """Other interests, more spread habits: what is common at home is rare there."""
        params = shifted["users"]

        def closest(params):
            _, interest = users.draw(jnp.arange(4096), params)
            topic = jnp.argmax(interest @ params.centroids.T, axis=1)
            return np.bincount(np.asarray(topic), minlength=parameters.TOPICS)

        here, there = closest(sim.default_params), closest(params)
        assert np.corrcoef(here, there)[0, 1] < 0.0
        assert here[:8].sum() > 1.5 * there[:8].sum()

        def spread(sums):
            return np.std(sums["watch_time"] / sums["depth"])

        assert spread(serve(reference_policies.production, params)) > 1.1 * spread(sums["production"])
