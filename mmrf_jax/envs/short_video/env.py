"""reset and step of the world: a session from arrival to exit."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmrf_jax import random, types
from mmrf_jax.envs.environment import Environment, StepResult
from mmrf_jax.envs.rankers import PrivilegedPolicy, Ranker
from mmrf_jax.envs.short_video import items, leaving, observable, parameters, response, users
from mmrf_jax.envs.short_video.truth import truth_of
from mmrf_jax.signals import SHORT_VIDEO

_WATCH_TIME = SHORT_VIDEO.index("watch_time")
_RUNS = 6  # topic clusters that a request retrieves from
_RETRIEVAL_SHARPNESS = 6.0
_TOURNAMENT = 3  # the history at arrival shows the best of this many draws, as a ranker would


@struct.dataclass
class WorldState:
    """The full state of B users in their sessions; hidden from the agents."""

    user_id: chex.Array  # [B] int32
    day: chex.Array  # [B] int32
    hour: chex.Array  # [B] float32 in [0, 24)
    position: chex.Array  # [B] int32, requests served so far
    traits: users.Traits
    interest: chex.Array  # [B, LATENT] unit vectors, drifting
    satiation: chex.Array  # [B, TOPICS]
    total_enjoyment: chex.Array  # [B] mean enjoyment per request, summed over the session
    candidates: chex.Array  # [B, C] int32


def make_world(config: parameters.WorldConfig) -> ShortVideoEnv:
    """Build the world of a config."""
    params = items.make_world_params(config)
    run = -(-items.split(config.candidates)[0] // _RUNS)
    today, new = -parameters.FIRST_DAY, items.split(config.candidates)[2]
    smallest = int(np.asarray(params.cluster_live)[today].min())
    if config.candidates != config.num_videos and smallest < run:
        raise ValueError(
            f"world.num_videos={config.num_videos} leaves a topic with {smallest} videos, but "
            f"world.candidates={config.candidates} needs {run} of one topic; use more videos or fewer candidates"
        )
    uploaded = np.asarray(params.uploaded)
    fewest = int((uploaded[today:] - uploaded[today - 3 : -3]).min())
    if config.candidates != config.num_videos and fewest < new:
        raise ValueError(
            f"world.num_videos={config.num_videos} has days with {fewest} new videos, but "
            f"world.candidates={config.candidates} needs {new}; use more videos or fewer candidates"
        )
    return ShortVideoEnv(params, SHORT_VIDEO, config.slate)


def reset(key: types.Key, params: parameters.WorldParams, user_ids: chex.Array, day: chex.Array):
    """Start sessions: users arrive with a history and request their first slate; see `Environment.reset_env`."""
    config = params.config
    num_users, h = user_ids.shape[0], config.history
    traits, interest = users.draw(user_ids, params)
    day = jnp.broadcast_to(jnp.asarray(day, jnp.int32), (num_users,))
    n_history = h * (3 * _TOURNAMENT + response.NUM_UNIFORMS)
    u = random.per_user_uniform(
        jax.random.fold_in(key, 1), day, user_ids, 1 + n_history + _num_candidate_uniforms(config)
    )
    state = WorldState(
        user_id=user_ids,
        day=day,
        hour=24.0 * jnp.sqrt(u[:, 0]),  # more visits in the evening
        position=jnp.zeros((num_users,), jnp.int32),
        traits=traits,
        interest=interest,
        satiation=jnp.zeros((num_users, parameters.TOPICS), jnp.float32),
        total_enjoyment=jnp.zeros((num_users,), jnp.float32),
        candidates=_candidates(u[:, 1 + n_history :], traits, day, params),
    )
    history = _arriving_history(u[:, 1 : 1 + n_history].reshape(num_users, h, -1), state, params)
    return _request(key, state, params), history, state


def step(key: types.Key, state: WorldState, slate: chex.Array, params: parameters.WorldParams):
    """Sample feedback on slates [B, K] and whether users stay; see `Environment.step_env`."""
    config, b = params.config, params.behaviour
    num_users, k = slate.shape
    n_answer = k * response.NUM_UNIFORMS
    u = random.per_user_uniform(
        jax.random.fold_in(key, 2),
        state.day * 4096 + state.position,
        state.user_id,
        n_answer + 1 + _num_candidate_uniforms(config),
    )
    videos = jnp.take_along_axis(state.candidates, slate, axis=1)
    truth = truth_of(params, state, videos)
    feedback = response.respond(params, state.traits, truth, u[:, :n_answer].reshape(num_users, k, -1))
    stays = u[:, n_answer] < jax.nn.sigmoid(leaving.continue_logit(params, state, truth.enjoyment))
    position = state.position + 1
    terminated = ~stays
    truncated = stays & (position >= config.max_requests)

    watched = feedback[..., _WATCH_TIME] / (feedback[..., _WATCH_TIME] + 20.0)
    taste = params.hidden[videos][..., : parameters.LATENT]
    interest = users.unit(state.interest + b.drift * jnp.einsum("bk,bkd->bd", watched, taste))
    seen = jax.nn.one_hot(params.topic[videos], parameters.TOPICS, dtype=jnp.float32).sum(axis=1)
    next_state = dataclasses.replace(
        state,
        position=position,
        interest=interest,
        satiation=b.satiation_decay * state.satiation + b.satiation_gain * seen,
        total_enjoyment=state.total_enjoyment + truth.enjoyment.mean(axis=1),
        candidates=_candidates(u[:, n_answer + 1 :], state.traits, state.day, params),
    )
    exposure = types.Exposure(videos=videos, feedback=feedback, mask=jnp.ones(videos.shape, bool))
    return StepResult(exposure, _request(key, next_state, params), terminated, truncated), next_state


class ShortVideoEnv(Environment):
    """The world: users with hidden tastes watch, like, get bored and leave.

    See `Environment` for observation, action, reward, termination and truncation. The profile [B, Du] is a noisy view
    of taste, activity, patience, susceptibility to clickbait and sociability; the context [B, Dx] is the sine and
    cosine of the hour, and the position. The hidden state is a `WorldState`, the parameters are `WorldParams`.
    After `with_random_share` the context's first column is 1 at requests for a random slate, else 0.
    """

    reset_env = staticmethod(reset)
    step_env = staticmethod(step)
    next_visit = staticmethod(leaving.next_visit)

    def with_random_share(self, share: float) -> ShortVideoEnv:
        """Return the world with a share of requests, drawn by user and position, for a random slate.

        The world only marks these requests (`types.exposed_at_random`). `envs.rankers.WithRandomExposures` serves them.
        """
        return self.replace(default_params=self.default_params.replace(random_share=jnp.float32(share)))

    @property
    def reference_policies(self) -> dict[str, PrivilegedPolicy | Ranker]:
        """Production, random and the oracles; see `short_video.reference_policies` and `short_video.observable`."""
        return observable.arms(self.default_params)


def _request(key: types.Key, state: WorldState, params: parameters.WorldParams) -> types.Request:
    angle = 2.0 * jnp.pi * state.hour / 24.0
    position = jnp.log1p(state.position.astype(jnp.float32))
    columns = [jnp.sin(angle), jnp.cos(angle), position]
    if params.random_share is not None:
        key = jax.random.fold_in(key, 6)
        u = random.per_user_uniform(key, state.day * 4096 + state.position, state.user_id, 1)[:, 0]
        columns.insert(0, (u < params.random_share).astype(jnp.float32))
    return types.Request(state.user_id, state.traits.profile, jnp.stack(columns, axis=-1), state.candidates)


def _num_candidate_uniforms(config: parameters.WorldConfig) -> int:
    if config.candidates == config.num_videos:
        return 0
    return parameters.TOPICS + _RUNS + items.split(config.candidates)[1] + 1


def _candidates(u: chex.Array, traits: users.Traits, day: chex.Array, params: parameters.WorldParams) -> chex.Array:
    """Draw candidates [B, C], all distinct: clusters near the estimated interests, popular videos and new ones."""
    c, num_users = params.config.candidates, day.shape[0]
    if c == params.config.num_videos:
        return jnp.broadcast_to(jnp.arange(c, dtype=jnp.int32), (num_users, c))
    near, popular, new = items.split(c)
    row = params.day_index(day)
    topics = _near_topics(u[:, : parameters.TOPICS], traits, params)  # [B, _RUNS]
    u = u[:, parameters.TOPICS :]
    # Contiguous ids, so that gathering their features reads memory in order.
    length = -(-near // _RUNS)
    live = params.cluster_live[row[:, None], topics]
    start = params.cluster_start[topics] + jnp.floor(u[:, :_RUNS] * (live - length + 1).astype(jnp.float32)).astype(
        jnp.int32
    )
    runs = (start[..., None] + jnp.arange(length, dtype=jnp.int32)[None, None, :]).reshape(num_users, -1)[:, :near]
    # One video per stratum: a density proportional to 1 / rank without repeats.
    low, high = (
        edges.astype(jnp.float32) for edges in (params.popular_edges[None, :-1], params.popular_edges[None, 1:])
    )
    hits = (low + jnp.floor(u[:, _RUNS : _RUNS + popular] * (high - low))).astype(jnp.int32)[:, :popular]
    first, last = params.uploaded[row - 3], params.uploaded[row]
    offset = first + jnp.floor(u[:, -1] * (last - first - new + 1).astype(jnp.float32)).astype(jnp.int32)
    fresh = params.by_upload[offset[:, None] + jnp.arange(new, dtype=jnp.int32)[None, :]]
    return jnp.concatenate([runs, hits, fresh], axis=1)


def _near_topics(u: chex.Array, traits: users.Traits, params: parameters.WorldParams) -> chex.Array:
    """Sample _RUNS distinct topics [B, _RUNS] near the platform's estimate of the user's interests."""
    logits = _RETRIEVAL_SHARPNESS * traits.retrieval @ params.centroids.T
    return jax.lax.top_k(logits + random.to_gumbel(u), _RUNS)[1]


def _arriving_history(u: chex.Array, state: WorldState, params: parameters.WorldParams) -> types.Exposure:
    """Sample earlier exposures [B, H] with feedback, in closed form: good draws from near topics, without satiation.

    Args:
      u: [B, H, 3 * _TOURNAMENT + response.NUM_UNIFORMS].
    """
    num_users, h = u.shape[:2]
    t = _TOURNAMENT
    logits = _RETRIEVAL_SHARPNESS * state.traits.retrieval @ params.centroids.T
    cumulative = jnp.cumsum(jax.nn.softmax(logits), axis=-1)[:, None, None, :]
    topics = jnp.sum(cumulative[..., :-1] < u[..., :t, None], axis=-1)  # [B, H, t], by inverse transform
    live = params.cluster_live[params.day_index(0), topics]
    near = params.cluster_start[topics] + jnp.floor(u[..., t : 2 * t] * live.astype(jnp.float32)).astype(jnp.int32)
    num_popular = params.popular_edges[-1]
    popular = jnp.floor(num_popular.astype(jnp.float32) ** u[..., t : 2 * t]).astype(jnp.int32) - 1
    # A small item set that is ranked whole may have topics without a single video yet.
    drawn = jnp.where((u[..., 2 * t : 3 * t] < 0.7) & (live > 0), near, popular).reshape(num_users, -1)
    no_satiation = jnp.zeros_like(state.satiation)
    truth = response.affinity(params, state.traits, state.interest, no_satiation, drawn)
    shape = (num_users, h, t)
    best = jnp.argmax(truth.engagement.reshape(shape), axis=-1)[..., None]

    def pick(x):
        return jnp.take_along_axis(x.reshape(shape), best, axis=-1)[..., 0]

    chosen = jax.tree.map(pick, truth)
    # Positions within the old slates are not recorded: feedback is sampled as if each video had come first.
    feedback = response.respond(
        dataclasses.replace(params, behaviour=dataclasses.replace(params.behaviour, engagement_position=0.0)),
        state.traits,
        chosen,
        u[..., 3 * t :],
    )
    return types.Exposure(videos=pick(drawn), feedback=feedback, mask=jnp.ones((num_users, h), bool))
