"""Pareto: multi-objective actor-critic. One actor, one critic per signal, gradients combined by min-norm weights.

MGDA (Désidéri, 2012; Sener & Koltun, 2018): the convex combination of the objectives' gradients with the least norm
is a direction in which no objective decreases. Encoders and critics are those of MMRF; there is no feedback model.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp

from mmrf_jax.agents.mmrf import agent_state, training_step
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.models import optimization

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


def improve(
    config: AgentConfig,
    state: agent_state.AgentState,
    view: training_step.ActorBatch,
    reduction: optimization.Reduction,
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Compute the loss of the min-norm direction; see `agents.mmrf.training_step.Algorithm`."""

    def objectives(scores):
        value = training_step.objectives(config, state, scores, view.q)
        return view.mean(
            value
            - training_step.PROJECTION_WEIGHT
            * training_step.projection(scores, training_step.maximiser(config, state, view.q))
        )

    gradients = reduction.sum(jax.jacrev(lambda actor: objectives(view.act(actor)))(view.actor))
    flat = jnp.concatenate([g.reshape(config.num_agents, -1) for g in jax.tree.leaves(gradients)], axis=1)
    weights = jax.lax.stop_gradient(min_norm_weights(flat @ flat.T))
    objective = objectives(view.scores)
    # The weights sum to 1 on each device, because the objective is the device's part of the whole.
    metrics = {f"objective/{s}": objective[i] for i, s in enumerate(config.agent_signals)}
    return -weights @ objective, metrics


update = functools.partial(training_step.update, learner=training_step.Algorithm(improve))
