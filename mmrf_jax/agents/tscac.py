"""TSCAC (Cai et al., 2023): two-stage constrained actor-critic.

Stage one: one policy per auxiliary signal, each with a separate critic. Stage two: the main policy maximises watch time
and stays close to those policies,

  maximise  ⟨w, q_N⟩ + tau H(w) − Σ_i lambda_i KL(w ‖ w_i),

whose solution is the paper's, w ∝ Π_i w_i^(lambda_i / Λ) exp(q_N / Λ), Λ = tau + Σ_i lambda_i, where the entropy's tau
is the weight of one more, uniform policy. Both stages step together; stage two treats stage one's policies as fixed.
Encoders and critics are those of MMRF; there is no feedback model, and agents do not communicate.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import ops
from mmrf_jax.agents.mmrf import losses, training_step

CLOSENESS = 0.01  # lambda_i, of each auxiliary policy; tau is 0.25


def closeness(scores: chex.Array, others: chex.Array, slate: int) -> chex.Array:
    """Compute Σ_c binary KL of the relaxed exposure of scores [..., C] from those of `others` [..., A, C]: [..., A]."""
    w = ops.relaxed_top_k(scores, slate, 1.0)[..., None, :]
    v = ops.relaxed_top_k(others, slate, 1.0)
    w, v = (jnp.clip(x, 1e-6, 1.0 - 1e-6) for x in (w, v))
    return jnp.sum(w * jnp.log(w / v) + (1.0 - w) * jnp.log((1.0 - w) / (1.0 - v)), axis=-1)


def actor_loss(b: losses.ActorBatch, temperature: float) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Compute the actor losses of both stages; see `agents.mmrf.training_step.Algorithm`."""
    objective = b.mean(losses.objectives(b.scores, b.q, b.q_scale, b.num_shown, temperature))  # [N]
    stage_one = jax.lax.stop_gradient(b.scores[..., :-1, :])
    distance = b.mean(closeness(b.scores[..., -1, :], stage_one, b.num_shown)) / b.num_shown  # [N - 1]
    wanted = losses.optimal_scores(b.q, b.q_mean, b.q_scale, temperature)
    total = temperature + CLOSENESS * stage_one.shape[-2]
    main = temperature * wanted[..., -1, :] + CLOSENESS * stage_one.sum(axis=-2)
    wanted = jnp.concatenate([wanted[..., :-1, :], main[..., None, :] / total], axis=-2)
    projected = b.mean(losses.projection(b.scores, wanted).sum(axis=-1))
    metrics = {"loss/projection": projected, "loss/distance": distance.sum(), "objective": objective}
    return losses.PROJECTION_WEIGHT * projected + CLOSENESS * distance.sum() - objective.sum(), metrics


update = functools.partial(training_step.update, algorithm=training_step.Algorithm(actor_loss))
