"""A trained state as a `Ranker`: videos are encoded once, users' states are carried over slates."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import types
from mmrf_jax.agents.mmrf import acting, agent_state, encoding
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.envs import rankers
from mmrf_jax.models import embedding_table, embeddings, user_encoders


@functools.partial(jax.jit, static_argnames="config")
def item_encodings(state: agent_state.AgentState, items: types.Items, config: AgentConfig) -> chex.Array:
    """Encode all V videos: [V, D]; by own encoders [V, N, D]."""

    def encode(v):
        e = encoding.encode_videos(config, state.params["encoder"], state.tables, items, v)
        return jnp.swapaxes(e, 0, 1) if config.own_critics else e

    return embeddings.map_over_items(encode, items.num_videos)


def make_actor_ranker(
    state: agent_state.AgentState, items: types.Items, config: AgentConfig, temperature: float = 0.0
) -> rankers.Ranker:
    """Return the main agent's ranking as a policy; see `envs.rankers.Ranker`."""
    params = {
        "encoder": state.params["encoder"],
        "actor": state.params["actor"],
        "critics": acting.critics_of(state, config),
        "encodings": item_encodings(state, items, config),
        "duration": items.duration,
        "users": state.tables[embeddings.USER_TABLE],
    }
    start, score, observe = _functions(config)
    return rankers.Ranker(params, start, score, observe, temperature)


@functools.cache
def _functions(config: AgentConfig):
    """Return the policy's functions, the same objects for equal configs, so that jitted rollouts are compiled once."""
    users = user_encoders.of(config)

    def write(params, carry, shown: types.Exposure, context):
        duration = params["duration"][shown.videos]

        def one(encoder_params, e, feedback, carry):
            exposed = users.shown(encoder_params, e, feedback, duration, shown.mask, context)
            return (
                users.start(encoder_params, exposed) if carry is None else users.update(encoder_params, carry, exposed)
            )

        e = params["encodings"][shown.videos]
        if not config.own_critics:
            return one(params["encoder"], e, shown.feedback, carry)
        seen = jnp.einsum("bks,ns->nbks", shown.feedback, encoding.own_signals(config))
        mapped = jax.vmap(one, in_axes=(0, -2, 0, None if carry is None else 1), out_axes=1)
        return mapped(params["encoder"], e, seen, carry)

    def start(params, request, history):
        return write(params, None, history, None)

    def score(params, carry, request):
        return all_scores(config, params, carry, request)[:, -1]

    def observe(params, carry, request, shown):
        return write(params, carry, shown, request.context)

    return start, score, observe


def all_scores(config: AgentConfig, params, carry: user_encoders.Carry, request: types.Request) -> chex.Array:
    """Compute the scores [..., N, C] of every agent, the main one last."""
    z = user_state(config, params, carry, request)
    items = params["encodings"][request.candidates]
    if config.own_critics:
        items = jnp.swapaxes(items, 1, 2)  # [B, N, C, D]
    return acting.apply_actors(config, params["actor"], params["critics"], z, carry.mean(), items).scores


def user_state(config: AgentConfig, params, carry: user_encoders.Carry, request: types.Request) -> chex.Array:
    """Compute the user state z [..., Z] at a request; by own encoders [..., N, Z]."""
    row = embedding_table.lookup(params["users"], request.user_id)

    def one(encoder_params, carry, row):
        return user_encoders.of(config).read(encoder_params, carry, row, request.profile, request.context)

    if not config.own_critics:
        return one(params["encoder"], carry, row)
    return jax.vmap(one, in_axes=(0, 1, 0), out_axes=1)(params["encoder"], carry, encoding.own_rows(config, row))
