"""Losses of the agents in addition to the feedback losses: twin TD values and the deterministic policy gradient.

All functions return values per exposure or per request; `agents.mmrf.training_step` masks and averages them.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import ops
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.agents.mmrf.networks import CriticOutput
from mmrf_jax.models import heads


def rewards(config: AgentConfig, feedback: chex.Array, reward_scale: chex.Array) -> chex.Array:
    """Convert feedback [..., S] (or its expectation) to normalised rewards of agents [..., N], by their terms."""
    normalised = feedback / jax.lax.broadcast_to_rank(reward_scale, feedback.ndim)
    return jnp.stack(
        [sum(weight * normalised[..., i] for i, weight in terms) for terms in config.reward_terms], axis=-1
    )


def video_rewards(config: AgentConfig, out: CriticOutput, reward_scale: chex.Array) -> chex.Array:
    """Compute the immediate normalised reward [..., N, M] that the critics expect of each video."""
    expected = jnp.moveaxis(heads.expected_feedback(config.all_signals, out.feedback, reward_scale), -2, -1)
    reward = jnp.moveaxis(rewards(config, expected, reward_scale), -1, -2)
    return reward if out.gap is None else reward + out.gap


def video_values(
    config: AgentConfig, out: CriticOutput, value: chex.Array, stay: chex.Array, reward_scale: chex.Array
) -> chex.Array:
    """Compute q_i(s, c) = r_i,c + gamma p (1 - p) l_c V_i [..., N, M]: reward plus value of the effect on staying.

    To first order around the current exposure, a video changes the probability of another request by p (1 - p) times
    its effect l_c on the log-odds, and another request is worth gamma V_i.

    Args:
      out: outputs of the critics for M videos.
      value: [..., N], V_i(s).
      stay: [...], p at the current exposure.
    """
    reward = video_rewards(config, out, reward_scale)
    slope = config.discount * (stay * (1.0 - stay))[..., None] * value  # [..., N]
    return reward + slope[..., None] * out.continue_item_logit[..., None, :]


def slate_values(base: chex.Array, q: chex.Array, w: chex.Array) -> chex.Array:
    """Compute Q_i(s, w) = b_i(s) + sum_c w_c q_i(s, c) [..., N] from base [..., N], q [..., N, M] and w [..., M]."""
    return base + jnp.einsum("...nm,...m->...n", q, w)


def simulated_rewards(
    config: AgentConfig, feedback: chex.Array, uncertainty: chex.Array, reward_scale: chex.Array
) -> chex.Array:
    """Compute rewards [..., N] of counterfactual slates: r + beta u |r|, or -1 for `ablation=constant_negative`.

    Rewards are normalised. The bonus is scaled by |r|, so it also raises negative rewards.

    Args:
      feedback: [..., S], expected by the feedback model.
      uncertainty: [..., S], divided by its mean on impressions.
    """
    reward = rewards(config, feedback, reward_scale)
    if config.ablation == "constant_negative":
        return jnp.full_like(reward, -1.0)
    wide = uncertainty * jnp.abs(feedback) / jax.lax.broadcast_to_rank(reward_scale, feedback.ndim)
    width = jnp.stack(
        [sum(abs(weight) * wide[..., i] for i, weight in terms) for terms in config.reward_terms], axis=-1
    )
    return reward + config.uncertainty_bonus * width


def td_targets(reward: chex.Array, next_value: chex.Array, terminated: chex.Array, discount: float) -> chex.Array:
    """Compute r + gamma (1 - terminated) V(s'): reward and next_value [..., N], terminated [...]."""
    return reward + discount * jnp.where(terminated, 0.0, 1.0)[..., None] * next_value


def policy_objective(
    scores: chex.Array, q: chex.Array, slate: int, temperature: float, weight: chex.Array | None = None
) -> chex.Array:
    """Compute the value of the relaxed exposure with an entropy bonus: sum_c w_c q_c + tau H(w), divided by K.

    Its maximiser over scores is q / tau plus a constant, so an actor learns the order of all candidates and not only
    of those near the cut.

    Args:
      scores: [..., C].
      q: [..., C].
      weight: see `ops.soft_top_k`.
    """
    w = ops.soft_top_k(scores, slate, 1.0, weight)
    return (jnp.sum(w * q, axis=-1) + temperature * ops.entropy(w, weight)) / slate
