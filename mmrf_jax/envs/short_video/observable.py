"""What a platform can know about a user of the world: a filter over the hidden traits, and the oracle that ranks by it.

The oracle knows how users respond, and every video as a platform with unlimited logs would. Of a user it sees what the
platform sees: the profile, feedback on the history and the session, and that the user stays. Its belief about

    x = (interest [LATENT], activity, susceptibility, sociability, patience)

is a Gaussian, updated by assumed-density filtering: each observation depends on one linear combination of x, whose
posterior mean and variance are computed by quadrature. Approximations: the Gaussian (each signal is used once, in
order), interests of unit length only on average, and no use of which videos the history shows, a choice that depends
on the interests. Seconds per video are those expected over the belief; planning is that of `oracle_planning`.
"""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmrf_jax import types
from mmrf_jax.envs import rankers
from mmrf_jax.envs.short_video import parameters, reference_policies, response, users
from mmrf_jax.signals import SHORT_VIDEO

L = parameters.LATENT
ACTIVITY, SUSCEPTIBILITY, SOCIABILITY, PATIENCE = L, L + 1, L + 2, L + 3  # places in x, after the interest
STATE = L + 4
_WATCH_TIME, _CLICK = SHORT_VIDEO.index("watch_time"), SHORT_VIDEO.index("click")
_TRIPLES = np.array(list(itertools.permutations(range(parameters.TOPICS), 3)), np.int32)
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
_BLOCK = 64  # users whose prior is computed at a time
_TINY = 1e-30


@struct.dataclass
class Belief:
    """Belief about B users: x ~ N(mean, cov), and what is known of their sessions."""

    mean: chex.Array  # [B, STATE]
    cov: chex.Array  # [B, STATE, STATE]
    satiation: chex.Array  # [B, TOPICS]
    position: chex.Array  # [B] float32, requests served so far


def prior(params: parameters.WorldParams, profile: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Compute mean [B, STATE] and covariance of x given profiles [B, Du].

    An interest is a sum of three topics with noise, and the profile has a noisy view of its direction. Over the 29,760
    triples the posterior is exact but for Laplace's approximation of the view's length.
    """
    b = params.behaviour
    seen = profile[:, L:]
    noise = b.profile_noise**2
    habits, var = seen / (1.0 + noise), noise / (1.0 + noise)
    scale = b.susceptibility
    bait = jnp.exp(scale * habits[:, 2] + 0.5 * scale**2 * var)
    bait_var = jnp.expm1(scale**2 * var) * bait**2
    interest, spread = jax.lax.map(lambda r: _interest(params, r), users.unit(profile[:, :L]), batch_size=_BLOCK)
    mean = jnp.concatenate([interest, jnp.stack([habits[:, 0], bait, habits[:, 3], habits[:, 1]], axis=-1)], axis=-1)
    ones = jnp.full_like(bait, var)
    rest = jnp.stack([ones, bait_var, ones, ones], axis=-1)
    cov = jnp.zeros((len(profile), STATE, STATE), jnp.float32).at[:, :L, :L].set(spread)
    return mean, cov.at[:, np.arange(L, STATE), np.arange(L, STATE)].set(rest)


def _interest(params: parameters.WorldParams, view: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Compute mean [LATENT] and covariance of a user's interest given the view [LATENT] of its direction."""
    weight = params.topic_weight
    chosen = jnp.exp(weight - jax.nn.logsumexp(weight))[_TRIPLES]  # [n, 3]
    before = jnp.cumsum(chosen, axis=1) - chosen
    log_prior = jnp.sum(jnp.log(chosen) - jnp.log1p(-before), axis=1)
    centre = jnp.einsum("k,nkd->nd", jnp.asarray(users.TOPIC_WEIGHTS, jnp.float32), params.centroids[_TRIPLES])
    square = jnp.sum(centre**2, axis=1)
    direction, length = centre * jax.lax.rsqrt(square)[:, None], square + L * users.TASTE_NOISE**2
    view_noise = (0.25 * params.behaviour.retrieval_noise) ** 2
    # The view is the direction of (centre + noise), with noise of this variance relative to the centre's length.
    var = (users.TASTE_NOISE**2 + view_noise * length) / square
    cosine = direction @ view
    # Its density integrates over the unknown length s: s^(L - 1) exp(-(s² - 2 s cosine) / (2 var)).
    s = 0.5 * (cosine + jnp.sqrt(cosine**2 + 4.0 * (L - 1) * var))
    log_density = -0.5 * L * jnp.log(var) - 0.5 / var + (L - 1) * jnp.log(s) - (s**2 - 2.0 * s * cosine) / (2.0 * var)
    log_density -= 0.5 * jnp.log((L - 1) / s**2 + 1.0 / var)
    w = jax.nn.softmax(log_prior + log_density)
    shrink = jnp.sqrt(square / length)  # the interest is (centre + noise) / length
    precision = (length / users.TASTE_NOISE**2, 1.0 / view_noise)
    total = precision[0] + precision[1]
    on_centre, on_view = precision[0] * shrink / total, precision[1] * s * shrink / total
    mean = (w * on_centre) @ direction + (w @ on_view) * view
    mixed = jnp.outer((w * on_centre * on_view) @ direction, view)
    second = jnp.einsum("n,nd,ne->de", w * on_centre**2, direction, direction) + mixed + mixed.T
    second += (w @ on_view**2) * jnp.outer(view, view) + (w @ (1.0 / total)) * jnp.eye(L)
    return mean, second - jnp.outer(mean, mean)


def watch_log_likelihood(
    b: parameters.Behaviour, engagement: chex.Array, seconds: chex.Array, duration: chex.Array
) -> chex.Array:
    """Compute the log-likelihood of a play time given the engagement, up to a constant in it; arrays broadcast.

    Densities are in log seconds. There are atoms at the least play time of `play_curve` and at the video's ends.
    """
    normal = jax.scipy.stats.norm
    log_seconds, log_duration = jnp.log(seconds), jnp.log(duration)
    least = response.engagement_for(b, log_seconds)
    slope = sum(s * (least > k) for k, s in zip(b.curve_knots, b.curve_slopes, strict=True))
    played = normal.pdf((least - engagement) / b.engagement_noise) / (b.engagement_noise * jnp.maximum(slope, 1e-6))
    skipped = normal.pdf((log_seconds - b.skip_start) / response.SKIP_NOISE) / response.SKIP_NOISE

    def reaches(log_end):
        return normal.sf((response.engagement_for(b, log_end) - engagement) / b.engagement_noise)

    skips_through = normal.sf((log_duration - b.skip_start) / response.SKIP_NOISE)
    # A play of exactly the least time is one whose engagement is below the curve's first knot.
    inside = jnp.where(
        log_seconds <= b.curve_start,
        jnp.where(
            log_seconds < b.curve_start,
            b.skip_prob * skipped,
            (1.0 - b.skip_prob) * normal.cdf((b.curve_knots[0] - engagement) / b.engagement_noise),
        ),
        (1.0 - b.skip_prob) * played + b.skip_prob * skipped,
    )
    share = seconds / duration
    once = (1.0 - b.skip_prob - b.replay_prob) * reaches(log_duration) + b.skip_prob * skips_through
    twice = jnp.where(jnp.abs(share - 2.0) < 1e-4, reaches(log_duration + jnp.log(2.0)), played)
    value = jnp.where(share < 1.0 - 1e-4, inside, jnp.where(share < 1.0 + 1e-4, once, b.replay_prob * twice))
    return jnp.log(jnp.maximum(value, _TINY))


def _condition(mean, cov, a: chex.Array, offset: chex.Array, log_likelihood) -> tuple[chex.Array, chex.Array]:
    """Condition beliefs on observations of a·x + offset.

    Args:
      mean: [B, STATE].
      cov: [B, STATE, STATE].
      a: [B, STATE].
      offset: [B].
      log_likelihood: maps values of a·x + offset [B, nodes] to log-likelihoods [B, nodes].
    """
    towards = jnp.einsum("bij,bj->bi", cov, a)
    mu, var = jnp.sum(a * mean, axis=-1) + offset, jnp.maximum(jnp.sum(a * towards, axis=-1), 1e-8)
    nodes = mu[:, None] + jnp.sqrt(var)[:, None] * jnp.asarray(_NODES, jnp.float32)
    log_weight = log_likelihood(nodes) + jnp.asarray(np.log(_WEIGHTS), jnp.float32)
    w = jax.nn.softmax(log_weight, axis=-1)
    new = jnp.sum(w * nodes, axis=-1)
    new_var = jnp.sum(w * (nodes - new[:, None]) ** 2, axis=-1)
    gain = towards / var[:, None]
    mean = mean + gain * (new - mu)[:, None]
    return mean, cov + (new_var - var)[:, None, None] * gain[:, :, None] * gain[:, None, :]


def _at(interest: chex.Array, **others: chex.Array) -> chex.Array:
    """Return coefficients [..., STATE] of x: of the interest [..., LATENT], and of the named places."""
    place = {"activity": ACTIVITY, "susceptibility": SUSCEPTIBILITY, "sociability": SOCIABILITY, "patience": PATIENCE}
    zero = jnp.zeros(interest.shape[:-1], jnp.float32)
    rest = {place[name]: zero + value for name, value in others.items()}
    return jnp.concatenate([interest, jnp.stack([rest.get(i, zero) for i in range(L, STATE)], axis=-1)], axis=-1)


def _engagement(params: parameters.WorldParams, videos: chex.Array, bored: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Return coefficients [..., STATE] and offset [...] of the engagement with videos in x, as `response.affinity`."""
    b, hidden = params.behaviour, params.hidden[videos]
    quality, clickbait, log_duration = (hidden[..., L + i] for i in range(3))
    a = _at(
        b.engagement_match * users.MATCH_SCALE * hidden[..., :L],
        activity=jnp.float32(b.engagement_activity),
        susceptibility=b.engagement_clickbait * clickbait,
    )
    offset = (
        b.engagement_quality * quality + b.engagement_duration * (log_duration - 4.2) - b.engagement_satiation * bored
    )
    return a, offset


def _enjoyment(params: parameters.WorldParams, videos: chex.Array, bored: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Return coefficients [..., STATE] and offset [...] of the enjoyment of videos [...] in x."""
    b, hidden = params.behaviour, params.hidden[videos]
    offset = (
        b.enjoyment_quality * hidden[..., L]
        + b.enjoyment_clickbait * hidden[..., L + 1]
        + b.enjoyment_satiation * bored
    )
    return _at(b.enjoyment_match * users.MATCH_SCALE * hidden[..., :L]), offset


def observe_video(params: parameters.WorldParams, belief, video, feedback, bored, slot):
    """Condition beliefs on the feedback [B, S] on one video [B] each, shown in a slot [B], with this boredom [B].

    Args:
      params: of the world.
      belief: mean [B, STATE] and covariance [B, STATE, STATE].
      video: [B] int32.
      feedback: [B, S].
      bored: [B], satiation with the video's topic.
      slot: [B] or scalar, position in the slate.

    Returns:
      Mean and covariance.
    """
    (mean, cov), b, hidden = belief, params.behaviour, params.hidden[video]
    seconds, click = feedback[:, _WATCH_TIME], feedback[:, _CLICK]
    duration, log_seconds = jnp.exp(hidden[:, L + 2]), jnp.log1p(seconds)
    a, offset = _engagement(params, video, bored)

    def watched(engagement):
        return watch_log_likelihood(b, engagement, seconds[:, None], duration[:, None])

    mean, cov = _condition(mean, cov, a, offset - b.engagement_position * slot, watched)
    enjoyment_a, enjoyment_offset = _enjoyment(params, video, bored)
    match_a = _at(users.MATCH_SCALE * hidden[:, :L])
    zero = jnp.zeros_like(seconds)[:, None]
    known = response.Affinity(
        zero, zero, enjoyment_offset[:, None], zero, hidden[:, L + 1, None], hidden[:, L + 3, None]
    )

    def logit(name, sociability):  # of match 0: the logit is linear in x
        traits: Any = SimpleNamespace(sociability=jnp.full_like(seconds, sociability))
        return response.explicit_logit(b, name, traits, known, log_seconds[:, None], click[:, None])[:, 0]

    for name in response.EXPLICIT:
        _, enjoyment, match, *_ = getattr(b, name)
        signal = feedback[:, SHORT_VIDEO.index(name), None]
        asocial = logit(name, 0.0)
        a = (
            enjoyment * enjoyment_a
            + match * match_a
            + _at(jnp.zeros_like(hidden[:, :L]), sociability=logit(name, 1.0) - asocial)
        )

        def said(logit, signal=signal):
            return jax.nn.log_sigmoid(jnp.where(signal > 0.5, logit, -logit))

        mean, cov = _condition(mean, cov, a, asocial, said)
    return mean, cov


def start(params: parameters.WorldParams, profile: chex.Array, history: types.Exposure) -> Belief:
    """Return beliefs about users with profiles [B, Du] who arrive with histories [B, H]."""
    mean, cov = prior(params, profile)
    nothing = jnp.zeros(len(profile), jnp.float32)

    def body(belief, shown):
        video, feedback, mask = shown
        new = observe_video(params, belief, video, feedback, nothing, nothing)
        return jax.tree.map(lambda x, y: jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, y), new, belief), None

    shown = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (history.videos, history.feedback, history.mask))
    (mean, cov), _ = jax.lax.scan(body, (mean, cov), shown)
    return Belief(mean, cov, jnp.zeros((len(profile), parameters.TOPICS), jnp.float32), nothing)


def observe(params: parameters.WorldParams, belief: Belief, shown: types.Exposure) -> Belief:
    """Condition beliefs on the feedback on slates [B, K] and on the users' staying, and let interests drift."""
    b, k = params.behaviour, shown.videos.shape[1]
    bored = jnp.take_along_axis(belief.satiation, params.topic[shown.videos], axis=1)  # [B, K]

    def body(state, one):
        video, feedback, bored, slot = one
        return observe_video(params, state, video, feedback, bored, slot), None

    by_slot = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (shown.videos, shown.feedback, bored))
    slots = jnp.arange(k, dtype=jnp.float32)
    (mean, cov), _ = jax.lax.scan(body, (belief.mean, belief.cov), (*by_slot, slots))

    enjoyment_a, enjoyment_offset = (x.mean(axis=1) for x in _enjoyment(params, shown.videos, bored))
    patient = _at(jnp.zeros_like(enjoyment_a[:, :L]), patience=jnp.float32(b.continue_patience))
    offset = (
        b.continue_logit
        + b.continue_enjoyment * (enjoyment_offset - b.enjoyment_centre)
        - b.continue_fatigue * belief.position
    )
    mean, cov = _condition(mean, cov, b.continue_enjoyment * enjoyment_a + patient, offset, jax.nn.log_sigmoid)

    seconds = shown.feedback[..., _WATCH_TIME]
    push = b.drift * jnp.einsum("bk,bkd->bd", seconds / (seconds + 20.0), params.hidden[shown.videos][..., :L])
    length = 1.0 + 2.0 * jnp.sum(mean[:, :L] * push, axis=-1) + jnp.sum(push**2, axis=-1)
    scale = _at(jnp.broadcast_to(jax.lax.rsqrt(length)[:, None], push.shape), activity=1.0, susceptibility=1.0)
    scale = scale.at[:, SOCIABILITY:].set(1.0)
    mean = scale * mean.at[:, :L].add(push)
    seen = jax.nn.one_hot(params.topic[shown.videos], parameters.TOPICS, dtype=jnp.float32).sum(axis=1)
    satiation = b.satiation_decay * belief.satiation + b.satiation_gain * seen
    return Belief(mean, scale[:, :, None] * cov * scale[:, None, :], satiation, belief.position + 1.0)


def expect(
    params: parameters.WorldParams, belief: Belief, videos: chex.Array
) -> tuple[chex.Array, parameters.WorldParams, chex.Array]:
    """Return what is expected of users on videos [B, M], before any effect of the position in the slate.

    Returns:
      Engagement [B, M], parameters in which its uncertainty is added to the response noise, and enjoyment [B, M].
    """
    bored = jnp.take_along_axis(belief.satiation, params.topic[videos], axis=1)
    a, offset = _engagement(params, videos, bored)
    engagement = jnp.einsum("bcs,bs->bc", a, belief.mean) + offset
    var = jnp.einsum("bcs,bst,bct->bc", a, belief.cov, a)
    enjoyment_a, enjoyment_offset = _enjoyment(params, videos, bored)
    enjoyment = jnp.einsum("bcs,bs->bc", enjoyment_a, belief.mean) + enjoyment_offset
    return engagement, with_noise(params, jnp.maximum(var, 0.0)), enjoyment


def scores(
    params: parameters.WorldParams,
    belief: Belief,
    candidates: chex.Array,
    weight: float = reference_policies.PLANNING_WEIGHT,
) -> chex.Array:
    """Compute the expected seconds of candidates [B, C], plus `weight` seconds per unit of expected enjoyment."""
    engagement, wide, enjoyment = expect(params, belief, candidates)
    duration = jnp.exp(params.hidden[candidates][..., L + 2])
    unused = jnp.zeros_like(engagement)
    truth = response.Affinity(unused, engagement, enjoyment, duration, unused, unused)
    return response.expected_watch(wide, truth) + weight * enjoyment


def arms(params: parameters.WorldParams) -> dict[str, rankers.PrivilegedPolicy | rankers.Ranker]:
    """Return the arms that need no training: `reference_policies.policies`, and the oracle of what is observable."""
    return reference_policies.policies() | {"oracle_observable": policy(params)}


def _init(params, request: types.Request, history: types.Exposure) -> Belief:
    return start(params, request.profile, history)


def _score(params, belief: Belief, request: types.Request) -> chex.Array:
    return scores(params, belief, request.candidates)


def _observe(params, belief: Belief, request: types.Request, shown: types.Exposure) -> Belief:
    return observe(params, belief, shown)


def policy(params: parameters.WorldParams) -> rankers.Ranker:
    """Return the arm `oracle_observable`: the best slate by `scores`. It never reads the simulator's state."""
    return rankers.Ranker(params, _init, _score, _observe, 0.0)


def with_noise(params: parameters.WorldParams, var: chex.Array) -> parameters.WorldParams:
    """Return parameters with a variance added to the response noise of the engagement."""
    noise: Any = jnp.sqrt(params.behaviour.engagement_noise**2 + var)
    return dataclasses.replace(params, behaviour=dataclasses.replace(params.behaviour, engagement_noise=noise))
