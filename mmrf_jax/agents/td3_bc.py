"""TD3+BC (Fujimoto & Gu, 2021): one actor that maximises its critic's value and stays close to logged slates.

  maximise  a ⟨w, q⟩ / mean |⟨w, q⟩| − ‖w − w_logged‖² / K,   w the relaxed exposure of its scores, a = 2.5.

Encoders, twin critics and target networks are those of MMRF; there is no feedback model and no auxiliary agent.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import ops
from mmrf_jax.agents.mmrf import agent_state, training_step
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.models import optimization

ALPHA = 2.5


def improve(
    config: AgentConfig,
    state: agent_state.AgentState,
    view: training_step.ActorBatch,
    reduction: optimization.Reduction,
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Compute the TD3+BC actor loss; see `agents.mmrf.training_step.Algorithm`."""
    w = ops.soft_top_k(view.scores, config.slate, 1.0)  # [B, T, 1, C]
    # Centred, so that the value of showing anything at all is not credited to the policy.
    centred = view.q - view.q.mean(axis=-1, keepdims=True)
    value = jnp.sum(w * centred, axis=-1)[..., 0]  # [B, T]
    size = jax.lax.stop_gradient(reduction.sum(view.mean(jnp.abs(value))))
    distance = jnp.sum((w[..., 0, :] - view.logged) ** 2, axis=-1) / config.slate
    ascended, kept = view.mean(value) / (size + 1e-6), view.mean(distance)
    metrics = {f"objective/{config.agent_signals[-1]}": ascended, "loss/distance": kept}
    return kept - ALPHA * ascended, metrics


update = functools.partial(training_step.update, learner=training_step.Algorithm(improve))
