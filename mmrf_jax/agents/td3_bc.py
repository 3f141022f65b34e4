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
from mmrf_jax.agents.mmrf import losses, training_step

ALPHA = 2.5


def actor_loss(b: losses.ActorBatch, temperature: float) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Compute the TD3+BC actor loss; see `agents.mmrf.training_step.Algorithm`."""
    del temperature
    w = ops.relaxed_top_k(b.scores, b.num_shown, 1.0)  # [B, T, 1, C]
    # Centred, so that the value of showing anything at all is not credited to the policy.
    centred = b.q - b.q.mean(axis=-1, keepdims=True)
    value = jnp.sum(w * centred, axis=-1)[..., 0]  # [B, T]
    size = jax.lax.stop_gradient(b.mean(jnp.abs(value)))
    logged = ops.slate_to_multihot(b.slate, b.slate_mask, b.scores.shape[-1])
    distance = jnp.sum((w[..., 0, :] - logged) ** 2, axis=-1) / b.num_shown
    ascended, kept = b.mean(value) / (size + 1e-6), b.mean(distance)
    return kept - ALPHA * ascended, {"objective": ascended[None], "loss/distance": kept}


update = functools.partial(training_step.update, algorithm=training_step.Algorithm(actor_loss))
