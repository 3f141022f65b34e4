"""User responses to videos: engagement and enjoyment, then play time and explicit feedback.

Engagement and enjoyment partly agree (both grow with the match of taste and with quality) and partly compete (clickbait
is watched but not enjoyed), so ranking for watch time and ranking for the session differ.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmrf_jax import random
from mmrf_jax.envs.short_video import parameters, users
from mmrf_jax.signals import SHORT_VIDEO

EXPLICIT = ("like", "follow", "comment", "forward", "hate", "profile_enter")
SKIP_NOISE = 0.35
NUM_UNIFORMS = 2 + len(EXPLICIT)  # per exposure
_HERMITE_X, _HERMITE_W = np.polynomial.hermite_e.hermegauss(9)
_LEGENDRE_X, _LEGENDRE_W = np.polynomial.legendre.leggauss(16)  # error at most 0.3 %, for comment


@struct.dataclass
class Affinity:
    """The ground truth about users and videos before noise, [B, M] each."""

    match: chex.Array
    engagement: chex.Array
    enjoyment: chex.Array
    duration: chex.Array  # seconds
    clickbait: chex.Array
    appeal: chex.Array  # of the author


def affinity(
    params: parameters.WorldParams,
    traits: users.Traits,
    interest: chex.Array,
    satiation: chex.Array,
    videos: chex.Array,
) -> Affinity:
    """Compute the true affinities of videos [B, M] for users [B]; `respond` adds position effects."""
    b = params.behaviour
    hidden = params.hidden[videos]  # [B, M, LATENT + 6]
    quality, clickbait, log_duration, appeal = (hidden[..., parameters.LATENT + i] for i in range(4))
    match = users.MATCH_SCALE * jnp.einsum("bmd,bd->bm", hidden[..., : parameters.LATENT], interest)
    bored = jnp.take_along_axis(satiation, params.topic[videos], axis=1)
    engagement = (
        b.engagement_match * match
        + b.engagement_quality * quality
        + b.engagement_clickbait * traits.susceptibility[:, None] * clickbait
        + b.engagement_duration * (log_duration - 4.2)
        + b.engagement_activity * traits.activity[:, None]
        - b.engagement_satiation * bored
    )
    enjoyment = (
        b.enjoyment_match * match
        + b.enjoyment_quality * quality
        + b.enjoyment_clickbait * clickbait
        + b.enjoyment_satiation * bored
    )
    return Affinity(match, engagement, enjoyment, jnp.exp(log_duration), clickbait, appeal)


def play_curve(b: parameters.Behaviour, engagement: chex.Array) -> chex.Array:
    """Map engagement to the log of the play time in seconds, before the cut at the video's end."""
    out = b.curve_start
    for knot, slope in zip(b.curve_knots, b.curve_slopes, strict=True):
        out = out + slope * jax.nn.relu(engagement - knot)
    return out


def engagement_for(b: parameters.Behaviour, log_seconds: chex.Array) -> chex.Array:
    """Invert `play_curve`: return the least engagement with this play time; minus infinity if any reaches it."""
    out = jnp.full_like(log_seconds, -jnp.inf)
    start, slope = b.curve_start, 0.0
    for i, (knot, more) in enumerate(zip(b.curve_knots, b.curve_slopes, strict=True)):
        if i:
            start = start + slope * (knot - b.curve_knots[i - 1])
        slope = slope + more
        out = jnp.where(log_seconds > start, knot + (log_seconds - start) / slope, out)
    return out


def respond(params: parameters.WorldParams, traits: users.Traits, truth: Affinity, uniforms: chex.Array) -> chex.Array:
    """Sample feedback [B, K, S] on K videos shown in this order.

    Args:
      truth: affinities of the exposed videos, [B, K].
      uniforms: [B, K, NUM_UNIFORMS].
    """
    b = params.behaviour
    position = jnp.arange(truth.engagement.shape[1], dtype=jnp.float32)[None, :]
    noise = random.to_normal(uniforms[..., 0])
    log_seconds = play_curve(b, truth.engagement - b.engagement_position * position + b.engagement_noise * noise)
    log_seconds = jnp.where(uniforms[..., 1] > 1.0 - b.skip_prob, b.skip_start + SKIP_NOISE * noise, log_seconds)
    seconds = jnp.exp(log_seconds)
    longest = jnp.where(uniforms[..., 1] < b.replay_prob, 2.0, 1.0) * truth.duration
    seconds = jnp.minimum(seconds, longest)
    log_seconds = jnp.log1p(seconds)
    click, long_view = (rule.astype(jnp.float32) for rule in watch_rules(seconds, truth.duration))
    out = {"click": click, "long_view": long_view, "watch_time": seconds}
    for i, name in enumerate(EXPLICIT):
        out[name] = uniforms[..., 2 + i] < jax.nn.sigmoid(explicit_logit(b, name, traits, truth, log_seconds, click))
    return jnp.stack([out[s].astype(jnp.float32) for s in SHORT_VIDEO.names], axis=-1)


def watch_rules(seconds: chex.Array, duration: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Derive KuaiRand's click and long_view from play time and duration, both in seconds."""
    click = jnp.where(duration <= 7.0, seconds >= duration, seconds > 7.0)
    return click, seconds >= jnp.minimum(duration, 18.0)


def explicit_logit(b: parameters.Behaviour, name: str, traits: users.Traits, truth: Affinity, log_seconds, click):
    """Compute the log-odds of an explicit signal from log1p of the seconds watched and the click."""
    intercept, enjoyment, match, watched, bait, unclicked = getattr(b, name)
    social = 0.0 if name == "hate" else 0.4 * traits.sociability[:, None]
    author = 0.4 * truth.appeal if name in ("follow", "profile_enter") else 0.0
    logit = (
        intercept + enjoyment * truth.enjoyment + match * truth.match + watched * log_seconds + bait * truth.clickbait
    )
    return logit + unclicked * (1.0 - click) + social + author


def expected_watch(params: parameters.WorldParams, truth: Affinity) -> chex.Array:
    """Compute true expected seconds of videos at the first position, over response noise; shaped like `engagement`."""
    b = params.behaviour
    weight = _HERMITE_W / _HERMITE_W.sum()
    total = jnp.zeros_like(truth.engagement)
    for x, w in zip(_HERMITE_X, weight, strict=True):
        seconds = jnp.exp(play_curve(b, truth.engagement + b.engagement_noise * float(x)))
        once, twice = jnp.minimum(seconds, truth.duration), jnp.minimum(seconds, 2.0 * truth.duration)
        total += float(w) * ((1.0 - b.skip_prob - b.replay_prob) * once + b.replay_prob * twice)
    return total + b.skip_prob * jnp.exp(b.skip_start + 0.5 * SKIP_NOISE**2)


def expected_feedback(
    params: parameters.WorldParams, traits: users.Traits, truth: Affinity
) -> tuple[chex.Array, chex.Array]:
    """Compute the true expected feedback on each video at the first position, over all noise of `respond`.

    Click and long_view are exact. The others are integrated by Gauss–Legendre quadrature over the probability on either
    side of the click, one node at a time.

    Returns:
      Feedback [B, M, S], and the expectation [B, M] of log1p of the seconds.
    """
    b, normal = params.behaviour, jax.scipy.stats.norm
    # `respond` caps seconds at the duration or twice it, which changes neither rule of `watch_rules`.
    clicks = _noise_for(b, truth, jnp.minimum(truth.duration, 7.0))
    views = _noise_for(b, truth, jnp.minimum(truth.duration, 18.0))
    out = {}
    for name, (watching, skipping) in (("click", clicks), ("long_view", views)):
        out[name] = (1.0 - b.skip_prob) * normal.sf(watching) + b.skip_prob * normal.sf(skipping)

    def add(total, node):
        share, weight = node
        for click, side in ((0.0, -1.0), (1.0, 1.0)):
            # Fractions of the tail beyond the click, not of the whole: accurate far out in the tail too.
            tails = [normal.cdf(-side * threshold) for threshold in clicks]
            tiny = jnp.finfo(truth.engagement.dtype).tiny
            watching, skipping = (-side * normal.ppf(jnp.maximum(tail * share, tiny)) for tail in tails)
            played = jnp.exp(play_curve(b, truth.engagement + b.engagement_noise * watching))
            glimpsed = jnp.exp(b.skip_start + SKIP_NOISE * skipping)
            for chance, seconds, longest in (
                ((1.0 - b.skip_prob - b.replay_prob) * tails[0], played, truth.duration),
                (b.replay_prob * tails[0], played, 2.0 * truth.duration),
                (b.skip_prob * tails[1], glimpsed, truth.duration),
            ):
                log_seconds = jnp.log1p(jnp.minimum(seconds, longest))
                values = [
                    jax.nn.sigmoid(explicit_logit(b, name, traits, truth, log_seconds, click)) for name in EXPLICIT
                ]
                values += [jnp.expm1(log_seconds), log_seconds]
                total = [x + weight * chance * value for x, value in zip(total, values, strict=True)]
        return total, None

    total = [jnp.zeros_like(truth.engagement) for _ in (*EXPLICIT, "watch_time", "log_seconds")]
    nodes = (0.5 * (1.0 + _LEGENDRE_X), 0.5 * _LEGENDRE_W)
    total, _ = jax.lax.scan(add, total, jax.tree.map(lambda x: jnp.asarray(x, truth.engagement.dtype), nodes))
    out |= dict(zip((*EXPLICIT, "watch_time"), total[:-1], strict=True))
    return jnp.stack([out[s] for s in SHORT_VIDEO.names], axis=-1), total[-1]


def _noise_for(b: parameters.Behaviour, truth: Affinity, seconds: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Return the noise [B, M] above which a video plays this long: if the user watches, and if the user skips."""
    log_seconds = jnp.log(seconds)
    watching = (engagement_for(b, log_seconds) - truth.engagement) / b.engagement_noise
    return watching, (log_seconds - b.skip_start) / SKIP_NOISE
