"""BC: behaviour cloning. One actor maximises the likelihood of logged slates as Plackett–Luce rankings."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from mmrf_jax import ops, types
from mmrf_jax.agents.mmrf import agent_state, networks
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.models import embeddings, representation


def update(
    state: agent_state.AgentState,
    batch: types.SessionBatch,
    items: types.Items,
    config: AgentConfig,
    lr_scale: chex.Numeric = 1.0,
    simulated: types.CounterfactualSlates | None = None,
) -> tuple[agent_state.AgentState, dict[str, chex.Array]]:
    """Run one step on the log-likelihood of each shown video given those above it; an `agent_state.Update`."""
    del simulated
    videos = batch.candidates[:, :-1]
    candidates = embeddings.encode_videos(config, state.params["encoder"], state.tables, items, videos, batch.date)
    masks = batch.loss_masks()
    exposed, count = masks.exposure, masks.counts().exposure

    def loss_fn(params, encoded):
        z, memory_mean = encoded.user
        out = networks.Actor(config).apply(params["actor"], z[:, :-1], memory_mean[:, :-1], candidates)
        log_prob = ops.plackett_luce_log_prob(out.scores[..., -1, :], batch.slate[:, :-1], batch.slate_mask[:, :-1])
        loss = -jnp.sum(exposed * log_prob) / count
        return loss, {"loss/imitation": loss}

    inputs = representation.gather(batch, items)
    state, metrics, grad_norm = agent_state.step(state, inputs, loss_fn, config, lr_scale)
    return state, metrics | {"grad_norm": grad_norm}
