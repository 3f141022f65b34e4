"""The learned environment: the feedback model g answers slates, in sessions that start as those of a log.

A simulated user is a logged session start. Request t of the session has the candidates of that session's request t
while the log has one, then those of requests drawn at random from the log.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmrf_jax import random, types
from mmrf_jax.data import sessions
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.envs.environment import Environment, StepResult
from mmrf_jax.envs.rankers import PrivilegedPolicy
from mmrf_jax.models import embeddings, user_encoders
from mmrf_jax.models.feedback_model import counterfactuals, network
from mmrf_jax.models.feedback_model.network import FeedbackConfig, FeedbackState

ANSWERS = ("sampled", "expected")
_MAX_REQUESTS = 65_536  # of the log, held on the device
_REQUESTS_A_SESSION = 4  # a longer log gives at most one session per this many requests


@struct.dataclass
class Pool:
    """The part of a log that provides session starts and candidates: n sessions, r requests, padding."""

    user_id: chex.Array  # [n] int32
    profile: chex.Array  # [n, Du]
    history: types.Exposure  # [n, H]
    first: chex.Array  # [n + 1] int32, first request of each session
    context: chex.Array  # [r, Dx]
    candidates: chex.Array  # [r, C]
    slate: chex.Array  # [r, K] positions in candidates, -1 where fewer than K were shown
    num_sessions: chex.Array  # int32, n
    num_requests: chex.Array  # int32, r


@struct.dataclass
class FeedbackParams:
    """The feedback model g as the parameters of an environment."""

    params: Any  # of the twins
    encodings: chex.Array  # [2, V, D]
    users: chex.Array  # [2, U, d] embedding rows
    items: types.Items
    scale: chex.Array
    calibration: chex.Array
    edges: chex.Array
    quantiles: chex.Array
    pool: Pool
    config: FeedbackConfig = struct.field(pytree_node=False)
    max_requests: int = struct.field(pytree_node=False)
    answers: str = struct.field(pytree_node=False)


@struct.dataclass
class SimulatedState:
    """B simulated users in their sessions."""

    user_id: chex.Array  # [B] int32, of the simulation; seeds the randomness
    day: chex.Array  # [B] int32
    position: chex.Array  # [B] int32, requests served so far
    session: chex.Array  # [B] int32, index into the pool
    row: chex.Array  # [B] int32, request of the pool that provides the candidates
    memory: Any  # [B, 2, ...] of the twins' user encoder, user axis first, as in every state


def make_learned_env(
    state: FeedbackState,
    items: types.Items,
    config: FeedbackConfig,
    log: Sessions,
    max_requests: int,
    answers: str = "sampled",
    pool_requests: int = _MAX_REQUESTS,
) -> LearnedEnv:
    """Build an environment from the feedback model g.

    Args:
      log: log whose session starts are simulated.
      max_requests: longer sessions are cut and count as truncated.
      pool_requests: a longer log is cut to the first sessions with this many requests in total; the shapes of the
        environment are then the same for any log.
      answers: `sampled` feedback, or `expected`: probabilities instead of 0 and 1, and mean seconds.

    Raises:
      ValueError: if the log has no sessions or `answers` is unknown.
    """
    if answers not in ANSWERS:
        raise ValueError(f"unknown answers {answers!r} of the feedback simulator; use {' or '.join(ANSWERS)}")
    if not log.num_sessions:
        raise ValueError("the feedback simulator starts from logged sessions, but the log has none; use another log")
    params = FeedbackParams(
        params=state.params,
        encodings=network.encode_items(state, items, config),
        users=network.twin_rows({"user": state.tables[embeddings.USER_TABLE].rows})["user"],
        items=items,
        scale=state.scale,
        calibration=state.calibration,
        edges=state.edges,
        quantiles=state.quantiles,
        pool=jax.device_put(_pool(log, pool_requests)),
        config=config,
        max_requests=max_requests,
        answers=answers,
    )
    return LearnedEnv(params, config.all_signals, log.slate.shape[1])


def _pool(log: Sessions, pool_requests: int) -> Pool:
    def pad(x, size):
        return x

    if log.num_requests > pool_requests:
        most = pool_requests // _REQUESTS_A_SESSION
        fitting = int(np.searchsorted(log.offsets, pool_requests, side="right")) - 1
        log = sessions.select_sessions(log, np.arange(max(min(fitting, most), 1)))

        def pad(x, size):
            return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])
    else:
        most = log.num_sessions
    history = types.Exposure(log.history_videos, log.history_feedback, log.history_mask.astype(bool))
    return Pool(
        user_id=pad(log.user_id, most),
        profile=pad(log.profile, most),
        history=jax.tree.map(lambda x: pad(x, most), history),
        first=pad(log.offsets.astype(np.int32), most + 1),
        context=pad(log.context, pool_requests),
        candidates=pad(log.candidates, pool_requests),
        slate=pad(log.slate, pool_requests),
        num_sessions=np.int32(log.num_sessions),
        num_requests=np.int32(log.num_requests),
    )


def reset(key: types.Key, params: FeedbackParams, user_ids: chex.Array, day: chex.Array):
    """Start sessions as logged users did; see `Environment.reset_env`."""
    pool = params.pool
    num = pool.num_sessions
    day = jnp.broadcast_to(jnp.asarray(day, jnp.int32), user_ids.shape)
    u = random.per_user_uniform(jax.random.fold_in(key, 1), day, user_ids, 1)[:, 0]
    session = jnp.minimum((u * num).astype(jnp.int32), num - 1)
    history = jax.tree.map(lambda x: x[session], pool.history)
    state = SimulatedState(
        user_id=user_ids,
        day=day,
        position=jnp.zeros_like(user_ids),
        session=session,
        row=pool.first[session],
        memory=_start(params, history),
    )
    return _request(params, state), history, state


def step(key: types.Key, state: SimulatedState, slate: chex.Array, params: FeedbackParams):
    """Simulate feedback on slates [B, K] and whether users stay; see `Environment.step_env`.

    Each slate is cut to its first videos, as many as the logged request that provides the candidates had shown.
    """
    k, signals = slate.shape[1], params.config.all_signals
    number = counterfactuals.num_uniforms(signals)
    mask = jnp.arange(k, dtype=jnp.int32) < (params.pool.slate[state.row] >= 0).sum(axis=1, keepdims=True)
    u = random.per_user_uniform(
        jax.random.fold_in(key, 2),
        state.day * 4096 + state.position,
        state.user_id,
        k * number + 2,
    )
    videos = jnp.take_along_axis(params.pool.candidates[state.row], slate, axis=1)
    out = predict(params, state, videos)
    feedback = network.expected(params.config, out, params.scale)
    if params.answers == "sampled":
        numbers = u[:, : k * number].reshape(*videos.shape, -1)
        levels = network.mean_levels(out)
        feedback = counterfactuals.draw(
            signals, feedback, levels, params.edges, params.quantiles, params.scale, numbers
        )
    stays = u[:, -2] < network.continue_prob(out, mask.astype(feedback.dtype))
    shown = types.Exposure(videos=videos, feedback=jnp.where(mask[..., None], feedback, 0.0), mask=mask)
    position = state.position + 1
    pool, num_rows = params.pool, params.pool.num_requests
    own = pool.first[state.session] + position
    other = jnp.minimum((u[:, -1] * num_rows).astype(jnp.int32), num_rows - 1)
    next_state = dataclasses.replace(
        state,
        position=position,
        row=jnp.where(own < pool.first[state.session + 1], own, other),
        memory=_update(params, state.memory, shown, _request(params, state).context),
    )
    truncated = stays & (position >= params.max_requests)
    return StepResult(shown, _request(params, next_state), ~stays, truncated), next_state


def next_visit(key: types.Key, state: SimulatedState, params: FeedbackParams) -> chex.Array:
    """Return a visit one day later for every user: logs of single sessions do not say when users return."""
    return jnp.ones_like(state.day)


def predict(params: FeedbackParams, state: SimulatedState, videos: chex.Array):
    """Predict feedback on videos [B, M] at the users' next request, by both twins."""
    request = _request(params, state)
    encoder, memory = user_encoders.of(params.config), _twins_first(state.memory)

    def user(p, memory, users):
        row = users.at[request.user_id].get(mode="fill", fill_value=0)
        return encoder.read(p, memory, row, request.profile, request.context)

    z = jax.vmap(user)(params.params["encoder"], memory, params.users)
    out = network.predict(params.config, params.params, z, memory.mean(), params.encodings[:, videos])
    return network.calibrated(params.config, out, params.calibration, request.context)


def logged_slates(params: FeedbackParams, state: SimulatedState) -> chex.Array:
    """Return scores [B, C] that reproduce the logged slates in their order: the logging policy."""
    slate, c = params.pool.slate[state.row], params.pool.candidates.shape[1]
    rank = jnp.arange(slate.shape[1], dtype=jnp.int32)
    hits = (slate[..., None] == jnp.arange(c, dtype=jnp.int32)) * (slate.shape[1] - rank)[:, None]
    return hits.sum(axis=1).astype(jnp.float32)


def no_preference(params: FeedbackParams, state: SimulatedState) -> chex.Array:
    """Return equal scores [B, C]: uniform slates when served as Plackett–Luce."""
    return jnp.zeros((state.row.shape[0], params.pool.candidates.shape[1]), jnp.float32)


class LearnedEnv(Environment):
    """The feedback model g as an environment; sessions start as those of a log.

    See `Environment` for observation, action, reward, termination and truncation. Fewer than K videos are shown where
    the logged request showed fewer. The hidden state is a `SimulatedState`, the parameters are `FeedbackParams`.
    """

    reset_env = staticmethod(reset)
    step_env = staticmethod(step)
    next_visit = staticmethod(next_visit)

    @property
    def reference_policies(self) -> dict[str, PrivilegedPolicy]:
        """The logging policy, and uniform slates."""
        return {"logged": PrivilegedPolicy(logged_slates, 0.0), "random": PrivilegedPolicy(no_preference, 1.0)}


def _twins_first(memory: Any) -> Any:
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), memory)


def _start(params: FeedbackParams, history: types.Exposure) -> Any:
    """Return the carries [B, 2, ...] of the twins after a history."""
    users = user_encoders.of(params.config)

    def one(p, encodings):
        return users.start(p, _encode(params, p, encodings, history, None))

    return jax.vmap(one, out_axes=1)(params.params["encoder"], params.encodings)


def _update(params: FeedbackParams, memory: Any, shown: types.Exposure, context: chex.Array) -> Any:
    """Return the carries [B, 2, ...] of the twins after a request with this context."""
    users = user_encoders.of(params.config)

    def one(p, encodings, memory):
        return users.update(p, memory, _encode(params, p, encodings, shown, context))

    return jax.vmap(one, in_axes=(0, 0, 1), out_axes=1)(params.params["encoder"], params.encodings, memory)


def _encode(params: FeedbackParams, p, encodings: chex.Array, shown: types.Exposure, context: chex.Array | None):
    """Encode exposures for one twin."""
    items, duration = encodings[shown.videos], params.items.duration[shown.videos]
    return user_encoders.of(params.config).shown(p, items, shown.feedback, duration, shown.mask, context)


def _request(params: FeedbackParams, state: SimulatedState) -> types.Request:
    pool = params.pool
    context = pool.context[state.row]
    context = context.at[:, -1].set(jnp.log1p(state.position.astype(jnp.float32)))
    return types.Request(
        user_id=pool.user_id[state.session],
        profile=pool.profile[state.session],
        context=context,
        candidates=pool.candidates[state.row],
    )
