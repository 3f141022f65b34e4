"""A trained state as a `Ranker`: videos are encoded once, users' states are carried over slates."""

from __future__ import annotations

import functools

import chex
import jax

from mmrf_jax import types
from mmrf_jax.agents.mmrf import acting, agent_state
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.envs import rankers
from mmrf_jax.models import embedding_table, embeddings, user_encoders


@functools.partial(jax.jit, static_argnames="config")
def catalogue_encodings(state: agent_state.AgentState, items: types.Items, config: AgentConfig) -> chex.Array:
    """Encode all V videos: [V, D]."""

    def encode(v):
        return embeddings.encode_videos(config, state.params["encoder"], state.tables, items, v)

    return embeddings.over_catalogue(encode, items.num_videos)


def make(
    state: agent_state.AgentState, items: types.Items, config: AgentConfig, temperature: float = 0.0
) -> rankers.Ranker:
    """Return the main agent's ranking as a policy; see `envs.rankers.Ranker`."""
    params = {
        "encoder": state.params["encoder"],
        "actor": state.params["actor"],
        "critics": acting.critics_of(state, config),
        "encodings": catalogue_encodings(state, items, config),
        "duration": items.duration,
        "users": state.tables[embeddings.USER_TABLE],
    }
    start, score, observe = _functions(config)
    return rankers.Ranker(params, start, score, observe, temperature)


@functools.cache
def _functions(config: AgentConfig):
    """Return the policy's functions, the same objects for equal configs, so that jitted rollouts are compiled once."""
    users = user_encoders.of(config)

    def encode(params, shown: types.Exposure, context):
        e, duration = params["encodings"][shown.videos], params["duration"][shown.videos]
        return users.shown(params["encoder"], e, shown.feedback, duration, shown.mask, context)

    def start(params, request, history):
        return users.start(params["encoder"], encode(params, history, None))

    def score(params, carry, request):
        return all_scores(config, params, carry, request)[:, -1]

    def observe(params, carry, request, shown):
        return users.update(params["encoder"], carry, encode(params, shown, request.context))

    return start, score, observe


def all_scores(config: AgentConfig, params, carry: user_encoders.Carry, request: types.Request) -> chex.Array:
    """Compute the scores [..., N, C] of every agent, the main one last."""
    z = user_state(config, params, carry, request)
    items = params["encodings"][request.candidates]
    return acting.act(config, params["actor"], params["critics"], z, carry.mean(), items).scores


def user_state(config: AgentConfig, params, carry: user_encoders.Carry, request: types.Request) -> chex.Array:
    """Compute the user state z [..., Z] at a request."""
    user = (embedding_table.lookup(params["users"], request.user_id), request.profile, request.context)
    return user_encoders.of(config).read(params["encoder"], carry, *user)
