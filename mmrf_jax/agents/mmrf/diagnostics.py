"""How the agents hang together: the attention between them, and how far their gradients agree on what they share."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import types
from mmrf_jax.agents.mmrf import acting, agent_state, networks, training_step
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.models import embeddings, heads, representation
from mmrf_jax.parallel import programs

#: The parameters of the actors that all agents use alike: the query, key and value maps of their attention.
_SHARED = "collaboration"


def _still(state: agent_state.AgentState, batch: types.SessionBatch, items: types.Items, config: AgentConfig):
    """User states and memories at the first T requests, without dropout, and the encoded candidates."""
    rows = embeddings.lookup(state.tables, representation.ids(batch, items))
    r = representation.represent(config, state.params["encoder"], rows, batch, items, None)
    candidates = embeddings.encode_videos(
        config, state.params["encoder"], state.tables, items, batch.candidates, batch.date
    )
    return (r.z[:, :-1], r.memory_mean[:, :-1]), candidates[:, :-1]


@programs.program(often=False, static_argnames="config")
def attention(
    state: agent_state.AgentState, batch: types.SessionBatch, items: types.Items, config: AgentConfig
) -> chex.Array:
    """Attention [heads, N, N], a row what an agent gives to the others, summed over the first T requests of a batch."""
    users, candidates = _still(state, batch, items, config)
    weights = networks.Actor(config).apply(state.params["actor"], *users, candidates).attention
    return jnp.einsum("bt,bthij->hij", representation.loss_masks(batch).request, weights)


@programs.program(often=False, static_argnames="config")
def actor_gradients(
    state: agent_state.AgentState,
    batch: types.SessionBatch,
    items: types.Items,
    predicted: types.FeedbackPrediction | None,
    config: AgentConfig,
) -> chex.Array:
    """Gradients [N, P] of each agent's policy objective, a sum over requests, by the maps of the attention.

    The rest of an actor is its own: nobody else's objective moves it but through what attention carries.

    Args:
      predicted: what a feedback model says of all candidates, if values are made of it too (`update.pool_values`).

    Raises:
      ValueError: where the agents do not collaborate, so that actors share nothing.
    """
    if _SHARED not in state.params["actor"]["params"]:
        raise ValueError(f"agents.ablation={config.ablation} with {config.num_agents} agents has no attention")
    users, candidates = _still(state, batch, items, config)
    weight = representation.loss_masks(batch).request
    first = jax.tree.map(lambda x: x[:, :-1], predicted)
    pool = networks.Critic(config).apply(state.target, *users, candidates)
    base = acting.base_scores(config, acting.critics_of(state, config), pool)

    def total(shared):
        params = {"params": state.params["actor"]["params"] | {_SHARED: shared}}
        scores = networks.Actor(config).apply(params, *users, candidates, base).scores
        w = training_step.main_exposure(scores, config)
        q = training_step.pool_values(state, pool, w, first, config)[-1]
        return jnp.einsum("bt,btn->n", weight, training_step.objectives(config, state, scores, q))

    return _rows(jax.jacrev(total)(state.params["actor"]["params"][_SHARED]), config.num_agents)


@programs.program(often=False, static_argnames="config")
def encoder_gradients(
    state: agent_state.AgentState, batch: types.SessionBatch, items: types.Items, config: AgentConfig
) -> chex.Array:
    """Gradients [N, P] of the fall of each agent's own feedback loss, a sum over exposures, by the shared encoder.

    The encoder is taught by the critics' predictions of feedback; actors and values take its states as they are.
    """
    rows, learn = embeddings.lookup(state.tables, representation.ids(batch, items)), representation.loss_masks(batch)

    def total(encoder):
        r = representation.represent(config, encoder, rows, batch, items, None)
        out = networks.Critic(config).apply(state.params["critic"], r.z, r.memory_mean, r.shown)
        loss = heads.feedback_loss(out.feedback[:, :-1], batch.feedback[:, :-1], state.reward_scale)
        loss = jnp.einsum("btk,btks->s", learn.exposed, loss)
        return -jnp.stack([sum(loss[i] for i, _ in terms) for terms in config.reward_terms])

    return _rows(jax.jacrev(total)(state.params["encoder"]), config.num_agents)


def _rows(tree, num: int) -> chex.Array:
    """Leaves [N, …] as one matrix [N, P]."""
    return jnp.concatenate([x.reshape(num, -1) for x in jax.tree.leaves(tree)], axis=1)
