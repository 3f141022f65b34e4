"""IQL (Kostrikov et al., 2021): values by expectile regression on logged slates, the policy by weighted imitation.

  V = expectile_0.7 of Q(s, w_logged);  Q by TD towards r + gamma V(s');
  maximise  E[ min(exp(b A_k / spread), 100) log π(c_k | videos above it) ].

The critic is additive over the slate, so each shown video has an advantage, A_k = q(s, c_k) + (b(s) − V(s)) / K;
these sum to Q − V. Encoders and twin critics are those of MMRF; there is no feedback model and no auxiliary agent.
"""

from __future__ import annotations

import functools

import chex
import jax.numpy as jnp

from mmrf_jax import ops
from mmrf_jax.agents.mmrf import agent_state, training_step
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.models import optimization

EXPECTILE = 0.7
SHARPNESS = 3.0
MAX_WEIGHT = 100.0


def improve(
    config: AgentConfig,
    state: agent_state.AgentState,
    view: training_step.ActorBatch,
    reduction: optimization.Reduction,
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Compute the advantage-weighted imitation loss; see `agents.mmrf.training_step.Algorithm`."""
    del reduction
    slate, mask = view.batch.slate[:, :-1], view.batch.slate_mask[:, :-1]
    shown = jnp.maximum(mask.sum(axis=-1), 1)[..., None]
    q = jnp.take_along_axis(view.q[..., -1, :], slate, axis=-1)  # [B, T, K]
    advantage = q + (view.base[..., -1:] - view.value[..., -1:]) / shown
    weight = jnp.minimum(jnp.exp(SHARPNESS * advantage / state.q_scale[-1]), MAX_WEIGHT)
    log_prob = ops.plackett_luce_log_prob(view.scores[..., -1, :], slate, mask)
    loss = -view.mean(jnp.sum(jnp.where(mask, weight * log_prob, 0.0), axis=-1)) / config.slate
    return loss, {"loss/imitation": loss}


update = functools.partial(training_step.update, learner=training_step.Algorithm(improve, expectile=EXPECTILE))
