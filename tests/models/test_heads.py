"""Chances that stay below a ceiling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from scipy.special import expit, logit

from mmrf_jax.models import heads
from mmrf_jax.signals import SHORT_VIDEO

S = len(SHORT_VIDEO)


def test_below_is_the_log_odds_of_a_share_of_the_chance():
    x, k = np.meshgrid(np.linspace(-30.0, 30.0, 13), np.linspace(-4.0, 8.0, 7))
    got = heads.below(jnp.asarray(x, jnp.float32), jnp.asarray(k, jnp.float32))
    np.testing.assert_allclose(got, logit(expit(k) * expit(x)), rtol=1e-5, atol=2e-5)
    slope = jax.jit(jax.grad(lambda x: heads.below(x, 1.0)))(jnp.float32(60.0))  # far out it is flat, and finite
    assert np.isfinite(float(slope)) and abs(float(slope)) < 1e-6


@pytest.mark.slow
def test_learned_ceilings_hold_for_videos_unlike_those_shown():
    """A third of all videos is swiped away: of well matched ones, .57 are clicked, of others hardly any.

    Only matches of 0.5 and more are shown. Without a ceiling their flat log-odds are continued to the others.
    """
    rng = np.random.default_rng(0)

    def chance(match):
        return 0.66 * expit(1.5 * match)

    shown = rng.uniform(0.5, 4.0, (1, 4000, 1)).astype(np.float32)
    feedback = np.zeros((1, 4000, S), np.float32)
    feedback[..., 0] = rng.random((1, 4000)) < chance(shown[..., 0])
    scale, prior = jnp.ones(S), heads.prior(SHORT_VIDEO, jnp.full(S, 0.5), jnp.ones(S))
    nothing, memory = jnp.ones((1, 1)), jnp.zeros((1, 1, 1, 2))

    def videos(match):
        return jnp.concatenate([jnp.ones_like(match), match], axis=-1)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=tiny.HOT)
    def error(ceilings):
        head = heads.FeedbackHeads(SHORT_VIDEO, ceilings=ceilings)
        params = head.init(jax.random.key(0), nothing, memory, videos(jnp.asarray(shown)))
        params["params"]["prior"] = prior[:, None]
        adam = optax.adam(0.02)

        def step(carry, _):
            params, state = carry

            def loss(p):
                return jnp.mean(
                    heads.feedback_loss(
                        SHORT_VIDEO, head.apply(p, nothing, memory, videos(shown)).feedback, feedback, scale
                    )[..., 0]
                )

            updates, state = adam.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), length=600)
        match = jnp.linspace(-4.0, 0.0, 50)[None, :, None]
        predicted = jax.nn.sigmoid(head.apply(params, nothing, memory, videos(match)).feedback[0, 0])
        return jnp.abs(predicted - 0.66 * jax.nn.sigmoid(1.5 * match[0, :, 0])).mean()

    free, bounded = float(error(False)), float(error(True))
    assert bounded < 0.5 * free, (free, bounded)
