"""The supervised myopic ranker: predicts the watch time of a video and ranks by it; the same encoders, no future.

The comparison that shows what ranking for the session adds (method.md, section 2).
"""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import types
from mmrf_jax.agents import networks, policy
from mmrf_jax.agents import state as st
from mmrf_jax.agents.config import AgentConfig
from mmrf_jax.encoders import encoder as enc
from mmrf_jax.encoders import heads, learning
from mmrf_jax.encoders import representation as rep
from mmrf_jax.simulators import base


def update(
    state: st.AgentState,
    batch: types.SessionBatch,
    items: types.Items,
    config: AgentConfig,
    rate: chex.Numeric = 1.0,
    axis_name: str | None = None,
) -> tuple[st.AgentState, dict[str, chex.Array]]:
    """One step of the regression of watch time; see `agents.update.update`."""
    reduction = learning.Reduction(axis_name)
    key = reduction.fold(jax.random.fold_in(state.key, state.step))
    learn = rep.learned(batch)
    count = jnp.maximum(reduction.sum(learn.exposed.sum()), 1.0)

    def loss_fn(params, rows):
        r = rep.represent(config, params["encoder"], rows, batch, items, key)
        out = networks.Critic(config).apply(params["critic"], r.z, r.memory_mean, r.shown)
        loss = heads.feedback_loss(out.feedback[:, :-1], batch.feedback[:, :-1], state.reward_scale)
        loss = jnp.sum(learn.exposed * loss[..., types.WATCH_TIME]) / count
        return loss, {"loss/watch_time": loss}

    state, metrics, grad_norm = st.step(state, rep.ids(batch, items), loss_fn, config, reduction, rate)
    return state, reduction.sum(metrics) | {"grad_norm": grad_norm}


def make(state: st.AgentState, items: types.Items, config: AgentConfig, temperature: float = 0.0) -> base.Policy:
    """Ranks by predicted watch time; see `simulators.base.Policy`."""
    served = policy.make(state, items, config, temperature)
    params = {name: value for name, value in served.params.items() if name != "actor"}
    return dataclasses.replace(served, params=params | {"critic": state.params["critic"]}, score=_score(config))


@functools.cache
def _score(config: AgentConfig):
    return lambda params, memory, request: scores(config, params, memory, request)[..., -1, :]


def scores(config: AgentConfig, params, memory: enc.Memory, request: types.Request) -> chex.Array:
    """Predicted log of the normalised watch time [..., 1, C], as the scores of a single agent."""
    z = policy.user_state(config, params, memory, request)
    items = params["encodings"][request.candidates]
    out = networks.Critic(config).apply(params["critic"], z, memory.mean(), items)
    return out.feedback[..., types.WATCH_TIME :, :]
