"""Scores of the actors: their critics' values plus a learned residual (after Silver et al., 2018, arXiv 1812.06298).

An actor that starts from its critic does not have to relearn what the critic knows. It only learns how values change at
the exposures of the policy, what a feedback model adds to them, and what other agents know.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from mmrf_jax.agents.mmrf import losses, networks
from mmrf_jax.agents.mmrf.agent_state import AgentState
from mmrf_jax.agents.mmrf.config import AgentConfig


@struct.dataclass
class Critics:
    """The parts of the critics that actors use."""

    params: Any  # of the target critics
    reward_scale: chex.Array  # [S]
    q_mean: chex.Array  # [N]
    q_scale: chex.Array  # [N]


def critics_of(state: AgentState, config: AgentConfig) -> Critics | None:
    """Return the critics that actors build on; None for actors that score alone (`AgentConfig.residual_actor`)."""
    if not config.residual_actor:
        return None
    return Critics(state.target, state.reward_scale, state.q_mean, state.q_scale)


def apply_critics(
    config: AgentConfig, params: Any, actor: Any, user: tuple[chex.Array, chex.Array], items: chex.Array
) -> networks.CriticOutput:
    """Apply the critics; own critics of agents that collaborate also receive the auxiliary agents' scores.

    Args:
      params: of the critics.
      actor: parameters of the actors, without gradient.
      user: states and means of the memories of users, see `networks.Critic`.
      items: encodings of M videos.
    """
    critic = networks.Critic(config)
    if not (config.own_critics and config.collaborates):
        return critic.apply(params, *user, items)
    known = jax.lax.stop_gradient((actor, *user, items))
    return critic.apply(params, *user, items, networks.Actor(config).apply(*known).scores[..., :-1, :])


def critic_scores(
    config: AgentConfig, critics: Critics, out: networks.CriticOutput, weight: chex.Array | None = None
) -> chex.Array:
    """Compute the scores [..., A, C] that critics alone would give C candidates, without gradient.

    Values are those around the uniform exposure, w = K / C, because no agent has acted yet.

    Args:
      out: outputs of the target critics for all candidates.
      weight: [..., C], see `ops.relaxed_top_k`.
    """
    effect = jnp.average(out.continue_item_logit, axis=-1, weights=weight)
    chance = jax.nn.sigmoid(out.continue_logit + config.slate * effect)
    reward = losses.video_rewards(config.all_signals, out, critics.reward_scale, config.reward_terms)
    q = losses.video_values(reward, out.continue_item_logit, out.value.min(axis=-2), chance, config.discount)
    scores = losses.optimal_scores(q, critics.q_mean, critics.q_scale, config.temperature)
    return jax.lax.stop_gradient(scores[..., -config.num_actors :, :])


def base_scores(
    config: AgentConfig, critics: Critics | None, out: networks.CriticOutput, weight: chex.Array | None = None
) -> chex.Array | None:
    """Return `critic_scores`, or None for actors that score alone."""
    return None if critics is None else critic_scores(config, critics, out, weight)


def apply_actors(
    config: AgentConfig,
    params: Any,
    critics: Critics | None,
    z: chex.Array,
    memory_mean: chex.Array,
    items: chex.Array,
) -> networks.ActorOutput:
    """Compute the scores of all agents for all candidates.

    Args:
      params: parameters of the actors.
      critics: see `critics_of`.
      z: [..., Z].
      memory_mean: [..., L, F, D].
      items: [..., C, D].
    """
    base = None
    if critics is not None:
        base = critic_scores(config, critics, networks.Critic(config).apply(critics.params, z, memory_mean, items))
    return networks.Actor(config).apply(params, z, memory_mean, items, base)
