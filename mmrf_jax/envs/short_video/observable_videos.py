"""What a platform can know about the world's videos: from their features, and from logs.

The oracle of `observable` takes the videos' attributes as known; `believed_params` are world parameters that hold a
belief about them in their place. `video_prior` is the belief given the videos' features. `learn_from_sessions` serves
sessions by the oracle of the current belief, and learns each video's quality and clickbait from the feedback. The
belief is a Gaussian per video, updated after every block of sessions by the gradient and the information of the
log-likelihood at its mean. Approximations: the belief about a user enters by its mean, and by its variance as response
noise; all videos have the mean uncertainty as response noise.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from mmrf_jax import ops, types
from mmrf_jax.envs.short_video import env, items, observable, parameters, response, users
from mmrf_jax.signals import SHORT_VIDEO

L = parameters.LATENT
_BLOCK = 1_024  # sessions between two updates
_STEP = 0.05  # of the engagement, for differences


@struct.dataclass
class VideoBelief:
    """Belief about the quality and clickbait of V videos."""

    mean: chex.Array  # [V, 2]
    precision: chex.Array  # [V, 2, 2]


def video_prior(params: parameters.WorldParams) -> VideoBelief:
    """Return the posterior given the videos' features (`items`): four mixtures of the two, and the popularity."""
    features = params.items.features
    mix = jnp.array(items.MIX, jnp.float32)
    # [2, 5], in units of the noise
    design = jnp.concatenate([mix / items.MIX_NOISE, jnp.full((2, 1), items.POPULARITY)], axis=1)
    seen = jnp.concatenate([features[:, L : L + 4] / items.MIX_NOISE, 2.0 * features[:, -1:]], axis=1)
    precision = design @ design.T + jnp.eye(2) / (2.0 * items.QUALITY_SPREAD**2)
    mean = seen @ design.T @ jnp.linalg.inv(precision)
    return VideoBelief(mean, jnp.broadcast_to(precision, (len(mean), 2, 2)))


def believed_params(params: parameters.WorldParams, belief: VideoBelief) -> parameters.WorldParams:
    """Return parameters in which videos are what a platform believes, for the filter of `observable`.

    Tastes are posterior means given features and topic, authors' appeal is 0. What stays unknown of the engagement is
    added to the response noise.
    """
    features, b = params.items.features, params.behaviour
    # Variances of a taste about its topic's centroid, and of the features about the taste.
    norm = 1.0 + items.TASTE_SPREAD**2  # of the squared sum before a taste is scaled to a unit vector, on average
    spread, noise = items.TASTE_SPREAD**2 / L / norm, items.CONTENT_NOISE**2
    topic = params.centroids[params.topic] / norm**0.5
    taste = (topic / spread + features[:, :L] / L**0.5 / noise) / (1.0 / spread + 1.0 / noise)
    loads = jnp.array([b.engagement_quality, b.engagement_clickbait], jnp.float32)
    var = jnp.einsum("i,vij,j->v", loads, jnp.linalg.inv(belief.precision), loads).mean()
    var += (b.engagement_match * users.MATCH_SCALE) ** 2 / (1.0 / spread + 1.0 / noise)
    hidden = params.hidden.at[:, :L].set(taste).at[:, L : L + 2].set(belief.mean).at[:, L + 3].set(0.0)
    return observable.with_noise(dataclasses.replace(params, hidden=hidden), var)


def learn_from_sessions(sim: env.ShortVideoEnv, key: types.Key, first_user: int, sessions: int) -> VideoBelief:
    """Return the belief after a number of sessions, rounded up to blocks, that its own oracle serves.

    Args:
      sim: the world.
      key: of the sessions.
      first_user: their first user id.
      sessions: their number.
    """
    belief = video_prior(sim.default_params)
    for block in range(-(-sessions // _BLOCK)):
        belief = _learn(sim, belief, key, jnp.int32(first_user + block * _BLOCK))
    return belief


@jax.jit
def _learn(sim: env.ShortVideoEnv, belief: VideoBelief, key: types.Key, first_user: chex.Array) -> VideoBelief:
    """Serve a block of sessions, and return the belief after them."""
    params, known = sim.default_params, believed_params(sim.default_params, belief)
    config, ids = params.config, first_user + jnp.arange(_BLOCK, dtype=jnp.int32)
    request, history, state = sim.reset_env(key, params, ids, jnp.int32(0))

    def body(carried, _):
        state, request, about, live, gradient, information = carried
        slate = ops.top_k(observable.scores(known, about, request.candidates), config.slate)
        result, state = sim.step_env(key, state, slate, params)
        shown = result.exposure
        g, info = evidence(known, about, shown, ~result.terminated)
        live_g = jnp.where(live[:, None, None], g, 0.0)
        live_info = jnp.where(live[:, None, None, None], info, 0.0)
        gradient = gradient.at[shown.videos].add(live_g)
        information = information.at[shown.videos].add(live_info)
        about = observable.observe(known, about, shown)
        return (state, result.request, about, live & ~result.terminated, gradient, information), None

    nothing = jnp.zeros_like(belief.mean), jnp.zeros_like(belief.precision)
    start = (state, request, observable.start(known, request.profile, history), jnp.ones(_BLOCK, bool), *nothing)
    *_, gradient, information = jax.lax.scan(body, start, None, length=config.max_requests)[0]
    precision = belief.precision + information
    return VideoBelief(belief.mean + jnp.linalg.solve(precision, gradient[..., None])[..., 0], precision)


def evidence(
    known: parameters.WorldParams, about: observable.Belief, shown: types.Exposure, stays: chex.Array
) -> tuple[chex.Array, chex.Array]:
    """Compute gradient [B, K, 2] and information [B, K, 2, 2] of slates' log-likelihood in quality and clickbait.

    Args:
      known: what is believed of the videos.
      about: what is believed of the users before the slate.
      shown: the slates, with feedback.
      stays: [B] bool, whether there was another request.
    """
    b, k = known.behaviour, shown.videos.shape[1]
    hidden, seconds = known.hidden[shown.videos], shown.feedback[..., SHORT_VIDEO.index("watch_time")]
    engagement, wide, enjoyment = observable.expect(known, about, shown.videos)
    engagement -= b.engagement_position * jnp.arange(k, dtype=jnp.float32)
    duration, click = jnp.exp(hidden[..., L + 2]), shown.feedback[..., SHORT_VIDEO.index("click")]
    # By differences: outcomes of probability 0 make the derivative of the others NaN.
    higher, lower = (
        observable.watch_log_likelihood(wide.behaviour, engagement + h, seconds, duration) for h in (_STEP, -_STEP)
    )
    score = (higher - lower) / (2.0 * _STEP)
    bait = jnp.broadcast_to(about.mean[:, None, observable.SUSCEPTIBILITY], engagement.shape)
    load = jnp.stack([jnp.full_like(bait, b.engagement_quality), b.engagement_clickbait * bait], axis=-1)
    gradient, information = score[..., None] * load, _outer(score**2, load)

    match = users.MATCH_SCALE * jnp.einsum("bkl,bl->bk", hidden[..., :L], about.mean[:, :L])
    truth = response.Affinity(match, engagement, enjoyment, duration, hidden[..., L + 1], hidden[..., L + 3])
    traits: Any = SimpleNamespace(sociability=about.mean[:, observable.SOCIABILITY])
    loads = jnp.array([b.enjoyment_quality, b.enjoyment_clickbait], jnp.float32)
    for name in response.EXPLICIT:
        p = jax.nn.sigmoid(response.explicit_logit(b, name, traits, truth, jnp.log1p(seconds), click))
        _, enjoyed, _, _, baited, _ = getattr(b, name)
        load = jnp.broadcast_to(enjoyed * loads + jnp.array([0.0, baited]), gradient.shape)
        gradient += (shown.feedback[..., SHORT_VIDEO.index(name)] - p)[..., None] * load
        information += _outer(p * (1.0 - p), load)

    patience = b.continue_patience * about.mean[:, observable.PATIENCE] - b.continue_fatigue * about.position
    p = jax.nn.sigmoid(
        b.continue_logit + b.continue_enjoyment * (enjoyment.mean(axis=1) - b.enjoyment_centre) + patience
    )
    load = jnp.broadcast_to(b.continue_enjoyment / k * loads, gradient.shape)
    gradient += (stays - p)[:, None, None] * load
    information += _outer(jnp.broadcast_to((p * (1.0 - p))[:, None], engagement.shape), load)
    return gradient, information


def _outer(weight: chex.Array, load: chex.Array) -> chex.Array:
    """Return weight * load load^T, [..., 2, 2]."""
    return weight[..., None, None] * load[..., :, None] * load[..., None, :]
