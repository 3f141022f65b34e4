"""One jitted update of encoder, critics, actors, targets and tables from a batch of session segments."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import optax

from mmrf_jax import types
from mmrf_jax.agents import exposure, losses, networks
from mmrf_jax.agents import representation as rep
from mmrf_jax.agents import state as st
from mmrf_jax.agents.config import AgentConfig

_SCALE_RATE = 0.01  # of the running spread of the critics
_VALUE_WEIGHT = 0.1  # of the TD losses beside the feedback losses
_MAX_SCORE = 20.0
_PROJECTION_WEIGHT = 0.1  # of the regression of scores on their maximiser


def update(
    state: st.AgentState,
    batch: types.SessionBatch,
    items: types.Items,
    config: AgentConfig,
    axis_name: str | None = None,
) -> tuple[st.AgentState, dict[str, chex.Array]]:
    """One update; jit it with `config` static and `state` donated.

    Args:
      batch: segments of T + 1 requests; the first T are learned from.
      axis_name: see `state.Reduction`.

    Returns:
      The next state and scalar metrics.
    """
    reduction = st.Reduction(axis_name)
    key = reduction.fold(jax.random.fold_in(state.key, state.step))
    candidates = st.encode_videos(config, state.params, state.tables, items, batch.candidates)

    def loss_fn(params, rows):
        return _loss(params, rows, state, batch, items, candidates, key, config, reduction)

    next_state, (metrics, mean, spread), grad_norm = st.step(state, rep.ids(batch, items), loss_fn, config, reduction)
    # The first spread is taken whole: the running mean of a handful of updates would start from 1.
    rate = jnp.where(state.step == 0, 1.0, _SCALE_RATE)
    next_state = dataclasses.replace(
        next_state,
        q_mean=(1.0 - rate) * state.q_mean + rate * mean,
        q_scale=(1.0 - rate) * state.q_scale + rate * spread,
    )
    return next_state, reduction.sum(metrics) | {"grad_norm": grad_norm}


def _loss(params, rows, state, batch, items, candidates, key, config, reduction):
    r = rep.represent(config, params["encoder"], rows, batch, items, key)
    learn = rep.learned(batch)
    actor, critic = networks.Actor(config), networks.Critic(config)
    count = lambda x: jnp.maximum(reduction.sum(x.sum()), 1.0)
    num_exposed, num_requests, num_known = count(learn.exposed), count(learn.request), count(learn.known)

    # Critics on what was shown, with gradient; on all candidates, for targets and actors, without.
    shown = critic.apply(params["critic"], r.z, r.memory_mean, r.shown)
    still = jax.lax.stop_gradient((r.z, r.memory_mean))
    acted = actor.apply(params["actor"], *still, candidates)
    scores = acted.scores  # [B, T+1, N, C]
    w_main = jax.lax.stop_gradient(exposure.soft_top_k(scores[..., -1, :], config.slate, 1.0))
    pool = critic.apply(state.target, *still, candidates)
    stay_main = losses.stay_probability(pool, w_main)
    q = losses.video_values(config, pool, pool.value.min(axis=-2), stay_main, state.reward_scale)  # [B, T+1, N, C]
    value = losses.slate_values(pool.base.min(axis=-2), q, w_main)  # [B, T+1, N], of the policy in force

    # Feedback and staying, by supervision.
    feedback = batch.feedback[:, :-1]
    per_signal = losses.feedback_loss(shown.feedback[:, :-1], feedback, state.reward_scale)
    feedback_loss = jnp.einsum("btk,btks->s", learn.exposed, per_signal) / num_exposed
    stay_logit = shown.stay_base[:, :-1] + jnp.sum(learn.exposed * shown.stay_effect[:, :-1], axis=-1)
    stays = jnp.where(batch.terminated[:, :-1], 0.0, 1.0)
    stay_loss = jnp.sum(learn.known * optax.sigmoid_binary_cross_entropy(stay_logit, stays)) / num_known

    # Twin values by TD; every critic bootstraps with the main agent's next exposure.
    reward = losses.rewards(config, feedback, state.reward_scale)  # [B, T, K, N]
    reward = jnp.einsum("btk,btkn->btn", learn.exposed, reward)
    target = losses.td_targets(reward, value[:, 1:], batch.terminated[:, :-1], config.discount)
    shown_q = jnp.take_along_axis(q[:, :-1], batch.slate[:, :-1, None, :], axis=-1)  # [B, T, N, K]
    slate_q = jnp.einsum("btnk,btk->btn", shown_q, learn.exposed)
    td_error = shown.base[:, :-1] + jax.lax.stop_gradient(slate_q - target)[..., None, :]  # [B, T, 2, N]
    base_loss = jnp.sum(learn.known[..., None, None] * td_error**2) / num_known
    value_error = shown.value[:, :-1] - jax.lax.stop_gradient(value[:, :-1])[..., None, :]
    value_loss = jnp.sum(learn.request[..., None, None] * value_error**2) / num_requests

    # Deterministic policy gradient through the relaxed exposure of each agent's scores.
    scaled = jax.lax.stop_gradient(q[:, :-1] / state.q_scale[:, None])
    objective = losses.policy_objective(scores[:, :-1], scaled, config.slate, config.temperature)  # [B, T, N]
    objective = jnp.einsum("bt,btn->n", learn.request, objective) / num_requests
    # Its gradient fades where w is near 0 or 1, and it leaves a request's mean score free. So scores are also drawn to
    # its maximiser, q / tau less a constant: far from the cut, and so that different requests can be compared.
    maximiser = (q[:, :-1] - state.q_mean[:, None]) / (state.q_scale[:, None] * config.temperature)
    maximiser = jax.lax.stop_gradient(jnp.clip(maximiser, -_MAX_SCORE, _MAX_SCORE))
    projection = jnp.mean((scores[:, :-1] - maximiser) ** 2, axis=-1)  # [B, T, N]
    projection_loss = jnp.sum(learn.request[..., None] * projection) / num_requests

    mean_q = q[:, :-1].mean(axis=-1)  # [B, T, N]
    centred = q[:, :-1] - mean_q[..., None]
    average = reduction.sum(jnp.einsum("bt,btn->n", learn.request, mean_q)) / num_requests
    spread = reduction.sum(jnp.einsum("bt,btnc->n", learn.request, centred**2)) / (num_requests * q.shape[-1])
    loss = jnp.sum(jnp.asarray(config.signal_weights) * feedback_loss) + stay_loss
    loss += _VALUE_WEIGHT * (base_loss + value_loss) + _PROJECTION_WEIGHT * projection_loss - jnp.sum(objective)
    metrics = {f"loss/{s}": feedback_loss[i] for i, s in enumerate(types.SIGNALS)}
    metrics |= {"loss/stay": stay_loss, "loss/base": base_loss, "loss/value": value_loss}
    metrics["loss/projection"] = projection_loss
    metrics |= {f"objective/{s}": objective[i] for i, s in enumerate(config.signals)}
    metrics["value/main"] = jnp.sum(learn.request * value[:, :-1, -1]) / num_requests
    return loss, (metrics, average, jnp.sqrt(spread + 1e-12))
