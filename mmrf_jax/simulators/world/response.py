"""How a user answers a video: drive and enjoyment, then play time and explicit feedback (method.md, section 5).

Watching and enjoying partly agree (both grow with the match of taste and quality) and partly compete (clickbait is
watched but not enjoyed), so a ranker of watch time and a ranker of sessions differ.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmrf_jax import types
from mmrf_jax.simulators import base
from mmrf_jax.simulators.world import params as p
from mmrf_jax.simulators.world import users

EXPLICIT = ("like", "follow", "comment", "forward", "hate", "profile_enter")
_SKIP_NOISE = 0.35
NUM_UNIFORMS = 2 + len(EXPLICIT)  # of one exposure
_HERMITE_X, _HERMITE_W = np.polynomial.hermite_e.hermegauss(9)


@struct.dataclass
class Affinity:
    """The truth about users and videos before noise, [B, M] each."""

    match: chex.Array
    drive: chex.Array
    enjoyment: chex.Array
    duration: chex.Array  # seconds
    clickbait: chex.Array
    appeal: chex.Array  # of the author


def affinity(
    params: p.WorldParams,
    traits: users.Traits,
    interest: chex.Array,
    satiation: chex.Array,
    videos: chex.Array,
) -> Affinity:
    """True affinities of videos [B, M] for users [B]; position effects are added by `respond`."""
    b = params.behaviour
    hidden = params.hidden[videos]  # [B, M, HIDDEN]
    quality, clickbait, log_duration, appeal = (hidden[..., p.LATENT + i] for i in range(4))
    match = users.MATCH_SCALE * jnp.einsum("bmd,bd->bm", hidden[..., : p.LATENT], interest)
    bored = jnp.take_along_axis(satiation, params.topic[videos], axis=1)
    drive = (
        b.drive_match * match
        + b.drive_quality * quality
        + b.drive_clickbait * traits.susceptibility[:, None] * clickbait
        + b.drive_duration * (log_duration - 4.2)
        + b.drive_activity * traits.activity[:, None]
        - b.drive_satiation * bored
    )
    enjoyment = b.joy_match * match + b.joy_quality * quality + b.joy_clickbait * clickbait + b.joy_satiation * bored
    return Affinity(match, drive, enjoyment, jnp.exp(log_duration), clickbait, appeal)


def play_curve(b: p.Behaviour, drive: chex.Array) -> chex.Array:
    """Log of the play time in seconds, before the video's end, as a function of the drive."""
    out = b.curve_start
    for knot, slope in zip(b.curve_knots, b.curve_slopes, strict=True):
        out = out + slope * jax.nn.relu(drive - knot)
    return out


def respond(params: p.WorldParams, traits: users.Traits, truth: Affinity, uniforms: chex.Array) -> chex.Array:
    """Feedback [B, K, S] on K videos shown in this order.

    Args:
      truth: affinities of the exposed videos, [B, K].
      uniforms: [B, K, NUM_UNIFORMS].
    """
    b = params.behaviour
    position = jnp.arange(truth.drive.shape[1])
    noise = base.to_normal(uniforms[..., 0])
    log_seconds = play_curve(b, truth.drive - b.drive_position * position + b.drive_noise * noise)
    log_seconds = jnp.where(uniforms[..., 1] > 1.0 - b.skip, b.skip_start + _SKIP_NOISE * noise, log_seconds)
    seconds = jnp.exp(log_seconds)
    longest = jnp.where(uniforms[..., 1] < b.replay, 2.0, 1.0) * truth.duration
    seconds = jnp.minimum(seconds, longest)
    log_seconds = jnp.log1p(seconds)
    click, long_view = watch_rules(seconds, truth.duration)
    out = {"click": click, "long_view": long_view, "watch_time": seconds}
    for i, name in enumerate(EXPLICIT):
        out[name] = uniforms[..., 2 + i] < jax.nn.sigmoid(explicit_logit(b, name, traits, truth, log_seconds, click))
    return jnp.stack([out[s].astype(jnp.float32) for s in types.SIGNALS], axis=-1)


def watch_rules(seconds: chex.Array, duration: chex.Array) -> tuple[chex.Array, chex.Array]:
    """KuaiRand's click and long_view from play time and duration, both in seconds (contract.md)."""
    click = jnp.where(duration <= 7.0, seconds >= duration, seconds > 7.0)
    return click, seconds >= jnp.minimum(duration, 18.0)


def explicit_logit(b: p.Behaviour, name: str, traits: users.Traits, truth: Affinity, log_seconds, click):
    """Log-odds of an explicit signal given the log1p of the seconds watched and whether that was a click."""
    intercept, joy, match, watched, bait, unclicked = getattr(b, name)
    social = 0.0 if name == "hate" else 0.4 * traits.sociability[:, None]
    author = 0.4 * truth.appeal if name in ("follow", "profile_enter") else 0.0
    logit = intercept + joy * truth.enjoyment + match * truth.match + watched * log_seconds + bait * truth.clickbait
    return logit + unclicked * (1.0 - click) + social + author


def expected_watch(params: p.WorldParams, truth: Affinity) -> chex.Array:
    """True expected seconds of each video at the first position, over the noise of the answer; the shape of `drive`."""
    b = params.behaviour
    weight = _HERMITE_W / _HERMITE_W.sum()
    total = jnp.zeros_like(truth.drive)
    for x, w in zip(_HERMITE_X, weight, strict=True):
        seconds = jnp.exp(play_curve(b, truth.drive + b.drive_noise * float(x)))
        once, twice = jnp.minimum(seconds, truth.duration), jnp.minimum(seconds, 2.0 * truth.duration)
        total += float(w) * ((1.0 - b.skip - b.replay) * once + b.replay * twice)
    return total + b.skip * jnp.exp(b.skip_start + 0.5 * _SKIP_NOISE**2)
