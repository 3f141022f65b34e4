"""BC: behaviour cloning. One actor maximises the likelihood of logged slates as Plackett–Luce rankings."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import ops, types
from mmrf_jax.agents.mmrf import agent_state, networks
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.models import embeddings, optimization, representation


def update(
    state: agent_state.AgentState,
    batch: types.SessionBatch,
    items: types.Items,
    config: AgentConfig,
    rate: chex.Numeric = 1.0,
    axis_name: str | None = None,
) -> tuple[agent_state.AgentState, dict[str, chex.Array]]:
    """Run one step on the log-likelihood of each shown video given those above it; see `training_step.update`."""
    reduction = optimization.Reduction(axis_name)
    key = reduction.fold(jax.random.fold_in(state.key, state.step))
    videos = batch.candidates[:, :-1]
    candidates = embeddings.encode_videos(config, state.params["encoder"], state.tables, items, videos, batch.date)
    learn = representation.loss_masks(batch)
    count = jnp.maximum(reduction.sum(learn.exposed.sum()), 1.0)

    def loss_fn(params, rows):
        r = representation.represent(config, params["encoder"], rows, batch, items, key)
        seen = (r.z[:, :-1], r.memory_mean[:, :-1], candidates)
        scores = networks.Actor(config).apply(params["actor"], *seen).scores[..., -1, :]
        log_prob = ops.plackett_luce_log_prob(scores, batch.slate[:, :-1], batch.slate_mask[:, :-1])
        loss = -jnp.sum(learn.exposed * log_prob) / count
        return loss, {"loss/imitation": loss}

    state, metrics, grad_norm = agent_state.step(
        state, representation.ids(batch, items), loss_fn, config, reduction, rate
    )
    return state, reduction.sum(metrics) | {"grad_norm": grad_norm}
