"""Rewards, values and losses of the agents: arrays in, arrays out. Numbers in parentheses are those of docs/update.md.

A loss is per video, request or slate; `agents.mmrf.training_step` masks, averages and weighs it. The losses of feedback
(1) and of staying (2), which the feedback model shares, are in `models.heads`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct

from mmrf_jax import ops
from mmrf_jax.agents.mmrf.networks import CriticOutput
from mmrf_jax.models import heads
from mmrf_jax.signals import Signals

MAX_SCORE = 20.0
PROJECTION_WEIGHT = 0.1  # of the regression of scores on their maximiser

RewardTerms = tuple[tuple[tuple[int, float], ...], ...]  # signals and weights of each agent: `AgentConfig.reward_terms`


def rewards(feedback: chex.Array, reward_scale: chex.Array, terms: RewardTerms) -> chex.Array:
    """Convert feedback [..., S] (or its expectation) to normalised rewards of agents [..., N], by their terms."""
    normalised = feedback / jax.lax.broadcast_to_rank(reward_scale, feedback.ndim)
    return jnp.stack([sum(weight * normalised[..., i] for i, weight in term) for term in terms], axis=-1)


def video_rewards(signals: Signals, out: CriticOutput, reward_scale: chex.Array, terms: RewardTerms) -> chex.Array:
    """Compute the immediate normalised reward [..., N, M] that the critics expect of each video."""
    expected = jnp.moveaxis(heads.expected_feedback(signals, out.feedback, reward_scale), -2, -1)
    reward = jnp.moveaxis(rewards(expected, reward_scale, terms), -1, -2)
    return reward if out.reward_residual is None else reward + out.reward_residual


def video_values(
    reward: chex.Array, effect: chex.Array, value: chex.Array, continue_prob: chex.Array, discount: float
) -> chex.Array:
    """Compute q_i(s, c) = r_i,c + gamma p (1 - p) l_c V_i (3): reward plus value of the effect on staying.

    To first order around the current exposure, a video changes the probability of another request by p (1 - p) times
    its effect l_c on the log-odds, and another request is worth gamma V_i.

    Args:
      reward: [..., N, M], r_i,c of M videos (`video_rewards`).
      effect: [..., M], l_c (`CriticOutput.continue_item_logit`); or [..., N, M], each agent's.
      value: [..., N], V_i(s).
      continue_prob: [...], p at the current exposure; or [..., N].
      discount: gamma.

    Returns:
      [..., N, M].
    """
    if continue_prob.ndim < value.ndim:
        continue_prob, effect = continue_prob[..., None], effect[..., None, :]
    slope = discount * (continue_prob * (1.0 - continue_prob)) * value  # [..., N]
    return reward + slope[..., None] * effect


def slate_values(slate_bias: chex.Array, q: chex.Array, w: chex.Array) -> chex.Array:
    """Compute Q_i(s, w) = b_i(s) + sum_c w_c q_i(s, c) (4) [..., N] from b [..., N], q [..., N, M] and w [..., M]."""
    return slate_bias + jnp.einsum("...nm,...m->...n", q, w)


def td_targets(reward: chex.Array, next_value: chex.Array, terminated: chex.Array, discount: float) -> chex.Array:
    """Compute r + gamma (1 - terminated) V(s') (5): reward and next_value [..., N], terminated [...]."""
    return reward + discount * jnp.where(terminated, 0.0, 1.0)[..., None] * next_value


def slate_bias_loss(slate_bias: chex.Array, slate_q: chex.Array, target: chex.Array) -> chex.Array:
    """Compute the squared TD error (b_i(s) + sum_c w_c q_i(s, c) - target_i)^2 (5), of the twins [..., 2, N].

    Only the biases learn from it: q has the feedback losses.

    Args:
      slate_bias: [..., 2, N].
      slate_q: [..., N], sum_c w_c q_i(s, c) of the target critics.
      target: [..., N].
    """
    chex.assert_axis_dimension(slate_bias, -2, 2)
    return (slate_bias + jax.lax.stop_gradient(slate_q - target)[..., None, :]) ** 2


def value_loss(value: chex.Array, target: chex.Array, expectile: float | None = None) -> chex.Array:
    """Compute the squared error of twin values [..., 2, N] to Q_i(s, w) [..., N] of the current policy's exposure (6).

    Args:
      expectile: weight of a shortfall, and one minus that of an excess (Kostrikov et al., 2021); None for 1 each.
    """
    chex.assert_axis_dimension(value, -2, 2)
    error = value - jax.lax.stop_gradient(target)[..., None, :]
    squared = error**2
    return squared if expectile is None else squared * jnp.where(error < 0.0, expectile, 1.0 - expectile)


def policy_objective(
    scores: chex.Array, q: chex.Array, slate: int, temperature: float, weight: chex.Array | None = None
) -> chex.Array:
    """Compute the value of the relaxed exposure with an entropy bonus: (sum_c w_c q_c + tau H(w)) / K (7).

    Its maximiser over scores is q / tau plus a constant, so an actor learns the order of all candidates and not only
    of those near the cut.

    Args:
      scores: [..., C].
      q: [..., C].
      slate: K.
      temperature: tau.
      weight: see `ops.relaxed_top_k`.
    """
    w = ops.relaxed_top_k(scores, slate, 1.0, weight)
    return (jnp.sum(w * q, axis=-1) + temperature * ops.entropy(w, weight)) / slate


def optimal_scores(q: chex.Array, q_mean: chex.Array, q_scale: chex.Array, temperature: float) -> chex.Array:
    """Return the maximiser of `policy_objective` of q over scores, q / tau less a constant; both [..., N, C].

    Args:
      q_mean: [N], running mean of q.
      q_scale: [N], running spread of q.
      temperature: tau, in units of that spread.
    """
    scale = jax.lax.broadcast_to_rank(q_scale[:, None] * temperature, q.ndim)
    wanted = (q - jax.lax.broadcast_to_rank(q_mean[:, None], q.ndim)) / scale
    return jnp.clip(wanted, -MAX_SCORE, MAX_SCORE)


def candidate_mean(x: chex.Array, weight: chex.Array | None) -> chex.Array:
    """Average [..., N, C] over the candidates, with weights [..., C]: [..., N]."""
    if weight is None:
        return jnp.mean(x, axis=-1)
    return jnp.einsum("...nc,...c->...n", x, weight / weight.sum(axis=-1, keepdims=True))


def projection(scores: chex.Array, wanted: chex.Array, weight: chex.Array | None = None) -> chex.Array:
    """Compute the mean squared distance [..., A] of scores [..., A, C] to targets; weight is [..., C] or None (8)."""
    return candidate_mean((scores - jnp.clip(wanted, -MAX_SCORE, MAX_SCORE)) ** 2, weight)


def objectives(
    scores: chex.Array,
    q: chex.Array,
    q_scale: chex.Array,
    slate: int,
    temperature: float,
    weight: chex.Array | None = None,
) -> chex.Array:
    """Compute the actors' objectives [..., N] (7): values, in units of their spread, at the exposures of scores.

    Args:
      scores: [..., A, C].
      q: [..., N, C].
      q_scale: [N], running spread of q.
      slate: K.
      temperature: tau.
      weight: [..., C], see `ops.relaxed_top_k`.
    """
    weight = None if weight is None else weight[..., None, :]
    scaled = jax.lax.stop_gradient(q / jax.lax.broadcast_to_rank(q_scale[:, None], q.ndim))
    return policy_objective(scores, scaled, slate, temperature, weight)


class ActorBatch(NamedTuple):
    """What an actor learns from: T requests of a batch, and what the critics say of them, without gradient."""

    scores: chex.Array  # [B, T, A, C], of the actors
    q: chex.Array  # [B, T, N, C], q_i(s, c)
    slate_bias: chex.Array  # [B, T, N], b_i(s)
    value: chex.Array  # [B, T, N], V_i(s) of the target critics
    q_mean: chex.Array  # [N], running mean of q over candidates
    q_scale: chex.Array  # [N], running spread of q over candidates
    slate: chex.Array  # [B, T, K], logged positions in the candidates
    slate_mask: chex.Array  # [B, T, K]
    weight: chex.Array | None  # [B, T, C], number of candidates that each represents; None for 1 each
    mean: Callable[[chex.Array], chex.Array]  # [B, T, ...] -> [...], over requests
    jacobian: Callable[..., chex.ArrayTree]  # (scores -> objectives [N]) -> their Jacobian in the actors' parameters

    @property
    def num_shown(self) -> int:
        """K."""
        return self.slate.shape[-1]


def actor_loss(b: ActorBatch, temperature: float) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Compute MMRF's actor loss: the deterministic policy gradient (7), and a regression on its maximiser (8).

    The gradient vanishes where w is near 0 or 1, and it does not determine a request's mean score. So scores are also
    regressed on the objective's maximiser, which is informative far from the cut and comparable across requests.
    """
    chex.assert_rank([b.scores, b.q, b.slate], [4, 4, 3])
    objective = b.mean(objectives(b.scores, b.q, b.q_scale, b.num_shown, temperature, b.weight))  # [N]
    wanted = optimal_scores(b.q, b.q_mean, b.q_scale, temperature)
    projected = b.mean(projection(b.scores, wanted, b.weight).sum(axis=-1))
    return PROJECTION_WEIGHT * projected - jnp.sum(objective), {"loss/projection": projected, "objective": objective}


def simulated_rewards(
    feedback: chex.Array, uncertainty: chex.Array, reward_scale: chex.Array, terms: RewardTerms, bonus: float
) -> chex.Array:
    """Compute rewards [..., N] of unshown videos, r + beta u |r| (9).

    Rewards are normalised. The bonus is scaled by |r|, so it also raises negative rewards.

    Args:
      feedback: [..., S], expected by the feedback model.
      uncertainty: [..., S], divided by its mean on impressions.
      bonus: beta.
    """
    reward = rewards(feedback, reward_scale, terms)
    wide = uncertainty * jnp.abs(feedback) / jax.lax.broadcast_to_rank(reward_scale, feedback.ndim)
    width = jnp.stack([sum(abs(weight) * wide[..., i] for i, weight in term) for term in terms], axis=-1)
    return reward + bonus * width


@struct.dataclass
class CounterfactualStep:
    """One slate w' that was not shown, as a step (s, w', r, s') of the feedback model, and its value by the critics."""

    feedback: chex.Array  # [K, S], expected by the model
    reward: chex.Array  # [N, K]
    reward_residual: chex.Array | None  # [N, K], reward beyond expected feedback; None where it is 0 by definition
    continue_prob: chex.Array  # [], p(s' exists), by the model
    next_value: chex.Array  # [N], V_i(s') of the target critics
    video_reward: chex.Array  # [N, K], `video_rewards` of the target critics, as the rest
    continue_logit: chex.Array  # [], l(s)
    continue_item_logit: chex.Array  # [K], l_c
    value: chex.Array  # [N], V_i(s)
    policy_continue_prob: chex.Array  # [], p(s, w) at the current policy's exposure w


def counterfactual_losses(
    signals: Signals, out: CriticOutput, slate: CounterfactualStep, reward_scale: chex.Array, discount: float
) -> dict[str, chex.Array]:
    """Compute the losses of one slate that was not shown: those of a shown one, with the model's answers (10).

    Staying enters by its probability, not to first order: these slates are far from the main agent's, and the single
    bias of a state would be biased to absorb the difference.

    Args:
      signals: the S signals.
      out: outputs of the critics for the K videos.

    Returns:
      "feedback" [K, S], "continuation" [], "slate_bias" [2, N], and "reward_residual" [N, K] if there is one.
    """
    chex.assert_rank([slate.feedback, slate.reward, slate.continue_prob, slate.next_value], [2, 2, 0, 1])
    everything = jnp.ones_like(slate.continue_item_logit)
    continue_prob = jax.nn.sigmoid(slate.continue_logit + slate.continue_item_logit.sum())
    slate_q = slate.video_reward.sum(axis=-1) + discount * (continue_prob - slate.policy_continue_prob) * slate.value
    target = slate.reward.sum(axis=-1) + discount * slate.continue_prob * slate.next_value
    terms = {
        "feedback": heads.feedback_loss(signals, out.feedback, slate.feedback, reward_scale),
        "continuation": heads.continuation_loss(out, everything, slate.continue_prob),
        "slate_bias": slate_bias_loss(out.slate_bias, slate_q, target),
    }
    if out.reward_residual is None:
        return terms
    return terms | {"reward_residual": (out.reward_residual - jax.lax.stop_gradient(slate.reward_residual)) ** 2}
