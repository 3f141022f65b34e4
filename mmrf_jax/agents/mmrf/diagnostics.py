"""Diagnostics: attention between agents, and how far the agents' gradients agree on shared parameters."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import ops, types
from mmrf_jax.agents.mmrf import acting, agent_state, encoding, losses, networks, training_step
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.models import heads
from mmrf_jax.parallel import programs

#: The actor parameters that all agents share: the query, key and value maps of their attention.
_SHARED = "collaboration"


def _without_dropout(state: agent_state.AgentState, batch: types.SessionBatch, items: types.Items, config: AgentConfig):
    """Return user states and memories at the first T requests, without dropout, and the encoded candidates."""
    encoded = encoding.encode_batch(config, state.params["encoder"], state.tables, batch, items)
    candidates = encoding.encode_videos(
        config, state.params["encoder"], state.tables, items, batch.candidates, batch.date
    )
    return jax.tree.map(lambda x: x[:, :-1], encoded.user), candidates[:, :-1]


@programs.program(calls="few", static_argnames="config")
def attention(
    state: agent_state.AgentState, batch: types.SessionBatch, items: types.Items, config: AgentConfig
) -> chex.Array:
    """Sum attention [heads, N, N] over the first T requests; row i holds the weights from agent i to the others."""
    users, candidates = _without_dropout(state, batch, items, config)
    weights = networks.Actor(config).apply(state.params["actor"], *users, candidates).attention
    return jnp.einsum("bt,bthij->hij", batch.loss_masks().request, weights)


@programs.program(calls="few", static_argnames="config")
def actor_gradients(
    state: agent_state.AgentState,
    batch: types.SessionBatch,
    items: types.Items,
    predicted: types.FeedbackPrediction | None,
    config: AgentConfig,
) -> chex.Array:
    """Compute gradients [N, P] of each agent's policy objective, summed over requests, w.r.t. the attention maps.

    The rest of an actor is separate: other agents' objectives change it only through what attention carries.

    Args:
      predicted: a feedback model's predictions for all candidates, if values use them too
        (`training_step.pool_values`).

    Raises:
      ValueError: if the agents do not collaborate, so that actors share nothing.
    """
    if _SHARED not in state.params["actor"]["params"]:
        raise ValueError(f"agents.ablation={config.ablation} with {config.num_agents} agents has no attention")
    users, candidates = _without_dropout(state, batch, items, config)
    weight = batch.loss_masks().request
    first = jax.tree.map(lambda x: x[:, :-1], predicted)
    pool = acting.apply_critics(config, state.target, state.params["actor"], users, candidates)
    base = acting.base_scores(config, acting.critics_of(state, config), pool)

    def total(shared):
        params = {"params": state.params["actor"]["params"] | {_SHARED: shared}}
        scores = networks.Actor(config).apply(params, *users, candidates, base).scores
        w = jax.lax.stop_gradient(ops.relaxed_top_k(scores[..., -1, :], config.slate, 1.0))
        q = training_step.pool_values(state, pool, w, first, config)[-1]
        value = losses.objectives(scores, q, state.q_scale, config.slate, config.temperature)
        return jnp.einsum("bt,btn->n", weight, value)

    return _rows(jax.jacrev(total)(state.params["actor"]["params"][_SHARED]), config.num_agents)


@programs.program(calls="few", static_argnames="config")
def encoder_gradients(
    state: agent_state.AgentState, batch: types.SessionBatch, items: types.Items, config: AgentConfig
) -> chex.Array:
    """Compute gradients [N, P] of minus each agent's feedback loss, summed over exposures, w.r.t. the shared encoder.

    Only the critics' predictions of feedback train the encoder; actors and values use its states without gradient.

    Raises:
      ValueError: if each agent has its own encoder.
    """
    if config.own_critics:
        raise ValueError("agents.critics=own has an encoder for each agent, so none is shared")
    exposed = batch.loss_masks().exposure

    def total(encoder):
        encoded = encoding.encode_batch(config, encoder, state.tables, batch, items)
        out = networks.Critic(config).apply(state.params["critic"], *encoded.user, encoded.shown)
        loss = heads.feedback_loss(config.all_signals, out.feedback[:, :-1], batch.feedback[:, :-1], state.reward_scale)
        loss = jnp.einsum("btk,btks->s", exposed, loss)
        return -jnp.stack([sum(loss[i] for i, _ in terms) for terms in config.reward_terms])

    return _rows(jax.jacrev(total)(state.params["encoder"]), config.num_agents)


def _rows(tree, num: int) -> chex.Array:
    """Concatenate leaves [N, …] to one matrix [N, P]."""
    return jnp.concatenate([x.reshape(num, -1) for x in jax.tree.leaves(tree)], axis=1)
