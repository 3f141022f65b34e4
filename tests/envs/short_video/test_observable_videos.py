"""What logs teach about videos: scores and information against the world's own noise, and learning that comes true."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax.envs.short_video import env, observable_videos, parameters

L, B = parameters.LATENT, 20_000


def error(params, belief):
    """Squared error [V, 2] of what is believed of quality and clickbait, and the variance that was expected."""
    truth = params.hidden[:, L : L + 2]
    return np.asarray((belief.mean - truth) ** 2), np.asarray(jnp.linalg.inv(belief.precision))


def test_at_the_truth_scores_have_mean_zero_and_the_information_as_covariance(small_world, sure_of):
    @jax.jit
    def serve(params):
        _, _, state = env.reset(jax.random.key(0), params, jnp.arange(B), jnp.int32(0))
        result, _ = env.step(jax.random.key(1), state, jnp.tile(jnp.arange(3), (B, 1)), params)
        return observable_videos.evidence(params, sure_of(state, 0.0), result.exposure, ~result.terminated)

    gradient, information = (np.asarray(x, np.float64) for x in serve(small_world.default_params))
    gradient, information = gradient.reshape(-1, 2), information.reshape(-1, 2, 2)
    spread = gradient.std(axis=0) / len(gradient) ** 0.5
    np.testing.assert_array_less(np.abs(gradient.mean(axis=0)), 4.0 * spread)
    covariance = gradient.T @ gradient / len(gradient)
    np.testing.assert_allclose(information.mean(axis=0), covariance, rtol=0.05, atol=0.002)


def test_features_tell_what_their_noise_allows(small_world):
    squared, variance = error(small_world.default_params, observable_videos.video_prior(small_world.default_params))
    np.testing.assert_allclose(squared.mean(axis=0), np.diag(variance[0]), rtol=0.25)


@pytest.mark.slow
def test_logs_teach_about_the_videos_that_they_show(small_world):
    """1,024 sessions: errors of videos that were shown often shrink as far as the belief says."""
    before = error(small_world.default_params, observable_videos.video_prior(small_world.default_params))[0]
    belief = observable_videos.learn_from_sessions(small_world, jax.random.key(2), 1_000, 1_024)
    after, variance = error(small_world.default_params, belief)
    often = variance[:, 1, 1] < 0.08
    assert often.sum() > 50
    assert after[often, 1].mean() < 0.6 * before[often, 1].mean()
    np.testing.assert_allclose(after[often, 1].mean(), variance[often, 1, 1].mean(), rtol=0.5)
