"""Pareto: multi-objective actor-critic. One actor, one critic per signal, gradients combined by min-norm weights.

MGDA (Désidéri, 2012; Sener & Koltun, 2018): the convex combination of the objectives' gradients with the least norm
is a direction in which no objective decreases. Encoders and critics are those of MMRF; there is no feedback model.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp

from mmrf_jax.agents.mmrf import losses, training_step

_STEPS = 100  # of Frank–Wolfe


def min_norm_weights(gram: chex.Array) -> chex.Array:
    """Compute the simplex weights [N] that minimise a' G a, by pairwise Frank–Wolfe steps with exact line search.

    Each step moves weight from the largest slope to the smallest. It converges linearly where plain Frank–Wolfe
    zigzags (Lacoste-Julien & Jaggi, 2015).

    Args:
      gram: [N, N] inner products of the gradients, G.
    """
    num = len(gram)

    def body(_, a):
        slope = gram @ a
        to, source = jnp.argmin(slope), jnp.argmax(jnp.where(a > 0.0, slope, -jnp.inf))
        curvature = gram[to, to] - 2.0 * gram[to, source] + gram[source, source]
        length = (slope[source] - slope[to]) / jnp.maximum(curvature, 1e-20)
        moved = jnp.where(to == source, 0.0, jnp.clip(length, 0.0, a[source]))
        return a.at[to].add(moved).at[source].add(-moved)

    return jax.lax.fori_loop(0, _STEPS, body, jnp.full((num,), 1.0 / num))


def actor_loss(b: losses.ActorBatch, temperature: float) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Compute the loss of the min-norm direction; see `agents.mmrf.training_step.Algorithm`."""

    def objectives(scores):
        value = losses.objectives(scores, b.q, b.q_scale, b.num_shown, temperature)
        wanted = losses.optimal_scores(b.q, b.q_mean, b.q_scale, temperature)
        return b.mean(value - losses.PROJECTION_WEIGHT * losses.projection(scores, wanted))

    gradients = jax.tree.leaves(b.jacobian(objectives))
    flat = jnp.concatenate([g.reshape(len(g), -1) for g in gradients], axis=1)  # [N, P]
    weights = jax.lax.stop_gradient(min_norm_weights(flat @ flat.T))
    objective = objectives(b.scores)
    return -weights @ objective, {"objective": objective}


update = functools.partial(training_step.update, algorithm=training_step.Algorithm(actor_loss))
