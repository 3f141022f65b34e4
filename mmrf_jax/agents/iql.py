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
from mmrf_jax.agents.mmrf import losses, training_step

EXPECTILE = 0.7
SHARPNESS = 3.0
MAX_WEIGHT = 100.0


def actor_loss(b: losses.ActorBatch, temperature: float) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Compute the advantage-weighted imitation loss; see `agents.mmrf.training_step.Algorithm`."""
    del temperature
    shown = jnp.maximum(b.slate_mask.sum(axis=-1), 1)[..., None]
    q = jnp.take_along_axis(b.q[..., -1, :], b.slate, axis=-1)  # [B, T, K]
    advantage = q + (b.slate_bias[..., -1:] - b.value[..., -1:]) / shown
    weight = jnp.minimum(jnp.exp(SHARPNESS * advantage / b.q_scale[-1]), MAX_WEIGHT)
    log_prob = ops.plackett_luce_log_prob(b.scores[..., -1, :], b.slate, b.slate_mask)
    loss = -b.mean(jnp.sum(jnp.where(b.slate_mask, weight * log_prob, 0.0), axis=-1)) / b.num_shown
    return loss, {"loss/imitation": loss}


update = functools.partial(training_step.update, algorithm=training_step.Algorithm(actor_loss, expectile=EXPECTILE))
