"""What the world says to expect, against the frequencies of what it does: feedback of a video and leaving."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax.envs.short_video import env, leaving, parameters, reference_policies, response
from mmrf_jax.envs.short_video import truth as hidden_truth
from mmrf_jax.signals import SHORT_VIDEO

TINY = parameters.WorldConfig(num_videos=3000, candidates=20, slate=3, history=8, max_requests=6)
B, USERS, DRAWS = 256, 3, 25_000
#: Under a second, up to 7 s, up to 18 s and beyond, each by users of little, fair and much engagement.
DURATION = (0.8, 5.0, 6.9, 7.0, 7.1, 12.0, 17.9, 18.5, 60.0, 400.0)
#: Explicit signals made common, and all but one moved by both the seconds and the click.
COMMON = {
    "like": (-0.5, 0.8, 0.0, 0.2, 0.0, -2.2),
    "follow": (-1.5, 0.8, 0.1, 0.3, 0.0, -0.5),
    "comment": (-2.5, 0.2, 1.0, 0.6, 0.0, -1.5),
    "forward": (-2.0, 0.6, 0.0, 0.0, 0.2, -0.8),
    "hate": (-2.0, -0.7, 0.0, 0.5, 0.9, 0.4),
    "profile_enter": (0.0, 0.5, 0.2, -0.4, 0.0, 1.0),
}

expected_feedback = jax.jit(response.expected_feedback)
respond = jax.jit(response.respond)
reset = jax.jit(env.reset)
step = jax.jit(env.step)
of_candidates = jax.jit(hidden_truth.expected_feedback)


@jax.jit
def true_continue_prob(params, state, slate):
    videos = jnp.take_along_axis(state.candidates, slate, axis=1)
    enjoyment = hidden_truth.truth_of(params, state, videos).enjoyment
    return jax.nn.sigmoid(leaving.continue_logit(params, state, enjoyment))


@pytest.fixture(scope="module")
def sim():
    return env.make_world(TINY)


@pytest.fixture(scope="module")
def arrived(sim):
    return reset(jax.random.key(0), sim.default_params, jnp.arange(B), 2)[2]


@pytest.fixture(scope="module")
def shown(arrived):
    """Traits of the users and affinities [USERS, videos]."""
    traits = jax.tree.map(lambda x: x[:USERS], arrived.traits).replace(sociability=jnp.array([-1.5, 0.0, 1.5]))
    shape = (USERS, len(DURATION))
    rng = np.random.default_rng(0)
    match, enjoyment, clickbait, appeal = jnp.asarray(rng.normal(size=(4, *shape)), jnp.float32)
    engagement = jnp.asarray(np.array([-1.5, 0.3, 1.8])[:, None] + rng.normal(size=shape), jnp.float32)
    duration = jnp.broadcast_to(jnp.array(DURATION), shape)
    return traits, response.Affinity(match, engagement, enjoyment, duration, clickbait, appeal)


@pytest.fixture(scope="module")
def answer(shown):
    """Answers [USERS, videos, DRAWS, S] to each video at the first position, and what they were drawn from, flat."""
    traits, truth = shown
    shape = (*truth.engagement.shape, DRAWS)

    def flat(x):
        return jnp.broadcast_to(x[..., None], shape).reshape(-1, 1)

    whose = jnp.repeat(jnp.arange(USERS), shape[1] * DRAWS)
    traits, truth = jax.tree.map(lambda x: x[whose], traits), jax.tree.map(flat, truth)
    # Of every video, the noise of watching and the choice to skip are spread evenly over the square (a golden lattice).
    uniforms = jax.random.uniform(jax.random.key(1), (whose.size, 1, response.NUM_UNIFORMS), minval=1e-7)
    i = np.arange(DRAWS)
    even = np.stack([(i + 0.5) / DRAWS, i * (5**0.5 - 1) / 2 % 1], axis=-1).astype(np.float32)
    uniforms = uniforms.at[:, 0, :2].set(np.tile(even, (shape[0] * shape[1], 1)))
    return lambda params: (respond(params, traits, truth, uniforms).reshape(*shape, -1), traits, truth)


def with_behaviour(params, **changes):
    return params.replace(behaviour=params.behaviour.replace(**changes))


class TestFeedback:
    @pytest.mark.parametrize("changes", [{}, {"skip_prob": 0.1, "replay_prob": 0.6, "engagement_noise": 0.7}])
    def test_frequencies_of_every_signal(self, sim, shown, answer, changes):
        params = with_behaviour(sim.default_params, **COMMON, **changes)
        expected = np.asarray(expected_feedback(params, *shown)[0], np.float64)[..., :-1]
        assert expected.shape == (USERS, len(DURATION), len(SHORT_VIDEO.binary_names))
        assert expected.min() >= 0 and expected.max() <= 1 and np.ptp(expected, axis=(0, 1)).min() > 0.1
        frequency = np.asarray(answer(params)[0]).mean(axis=2, dtype=np.float64)[..., :-1]
        error = np.sqrt(expected * (1 - expected) / DRAWS)
        off = np.abs(frequency - expected) / (error + 2e-5)
        for i, name in enumerate(SHORT_VIDEO.binary_names):
            assert off[..., i].max() < 4.5, (name, np.round(off[..., i], 1))

    def test_rare_signals_to_a_per_cent(self, sim, shown, answer):
        """With the world's own numbers: the mean chance of each signal, given the seconds that users answered with."""
        expected = np.asarray(expected_feedback(sim.default_params, *shown)[0], np.float64)
        feedback, traits, truth = answer(sim.default_params)
        seconds, click = (
            feedback.reshape(-1, 1, len(SHORT_VIDEO))[..., i] for i in (SHORT_VIDEO.index("watch_time"), 0)
        )
        for name in response.EXPLICIT:
            logit = response.explicit_logit(
                sim.default_params.behaviour, name, traits, truth, jnp.log1p(seconds), click
            )
            chance = np.asarray(jax.nn.sigmoid(logit), np.float64).reshape(USERS, len(DURATION), DRAWS).mean(axis=2)
            np.testing.assert_allclose(expected[..., SHORT_VIDEO.index(name)], chance, rtol=0.01, err_msg=name)

    def test_watch_time_and_its_logarithm(self, sim, shown, answer):
        expected, log_seconds = expected_feedback(sim.default_params, *shown)
        seconds = np.asarray(answer(sim.default_params)[0], np.float64)[
            ..., SHORT_VIDEO.index("watch_time")
        ]  # [U, videos, DRAWS]
        for found, drawn in (
            (expected[..., SHORT_VIDEO.index("watch_time")], seconds),
            (log_seconds, np.log1p(seconds)),
        ):
            error = drawn.std(axis=2) / np.sqrt(DRAWS)
            assert (np.abs(np.asarray(found) - drawn.mean(axis=2)) < 4.5 * error + 1e-3 * drawn.mean(axis=2)).all()

    def test_engagement_for_inverts_the_play_curve(self, sim):
        b = sim.default_params.behaviour
        engagement = jnp.linspace(-1.4, 6.0, 50)
        np.testing.assert_allclose(
            response.engagement_for(b, response.play_curve(b, engagement)), engagement, atol=1e-5
        )
        assert np.isneginf(response.engagement_for(b, jnp.array([-0.5, b.curve_start]))).all()

    def test_candidates_of_a_state(self, sim, arrived):
        """A state that is tired of topics; each candidate as if it came first."""
        tired = jnp.asarray(np.random.default_rng(2).uniform(0, 2, arrived.satiation.shape), jnp.float32)
        state = arrived.replace(satiation=tired)
        params = with_behaviour(sim.default_params, **COMMON)
        expected = np.asarray(of_candidates(params, state)[0], np.float64)
        assert expected.shape == (B, TINY.candidates, len(SHORT_VIDEO))
        np.testing.assert_allclose(expected[..., -1], reference_policies.oracle_myopic(params, state), rtol=0.1)
        truth = response.affinity(params, state.traits, state.interest, state.satiation, state.candidates)
        first = with_behaviour(params, engagement_position=0.0)
        seen, repeats, rng = 0.0, 12, np.random.default_rng(3)
        for _ in range(repeats):
            uniforms = rng.uniform(1e-7, 1 - 1e-7, (*state.candidates.shape, response.NUM_UNIFORMS))
            seen += np.asarray(respond(first, state.traits, truth, jnp.asarray(uniforms, jnp.float32))) / repeats
        for i, name in enumerate(SHORT_VIDEO.binary_names):
            x, y = expected[..., i], seen[..., i]
            for weight in (np.ones_like(x), x - x.mean(), np.asarray(truth.engagement, np.float64)):
                error = np.sqrt((weight**2 * x * (1 - x)).sum() / repeats)
                assert abs((weight * (y - x)).sum()) < 4 * error, name


class TestStay:
    def test_frequency_of_leaving(self, sim, arrived):
        """Later in a session, by slates that differ from user to user."""
        slates = np.random.default_rng(4).permuted(np.tile(np.arange(TINY.candidates), (B, 1)), axis=1)
        _, state = step(jax.random.key(0), arrived, slates[:, 6:9], sim.default_params)
        stay, other = (
            np.asarray(true_continue_prob(sim.default_params, state, slates[:, i : i + 3]), np.float64) for i in (0, 3)
        )
        assert stay.shape == (B,)
        keys = jax.random.split(jax.random.key(2), 48)
        left = [step(key, state, slates[:, :3], sim.default_params)[0].terminated for key in keys]
        stayed = 1.0 - np.mean(left, axis=0)
        # On average, by how likely it was, and by how much this slate, and no other, made it so.
        for weight in (np.ones(B), stay - stay.mean(), stay - other):
            error = np.sqrt((weight**2 * stay * (1 - stay)).sum() / len(keys))
            assert abs((weight * (stayed - stay)).sum()) < 4 * error
        assert np.abs(stay - other).mean() > 0.03
