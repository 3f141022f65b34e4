"""What the agents minimise: feedback regression, staying, twin TD values, and the deterministic policy gradient.

All functions return values per exposure or per request; `agents.update` masks and averages them.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax

from mmrf_jax import types
from mmrf_jax.agents import exposure
from mmrf_jax.agents.config import AgentConfig
from mmrf_jax.agents.networks import CriticOutput

_MAX_LOG_WATCH = 5.0  # of watch time over its standard deviation


def feedback_loss(predicted: chex.Array, feedback: chex.Array, reward_scale: chex.Array) -> chex.Array:
    """Loss of each signal [..., M, S]: Bernoulli for binary signals, quasi-Poisson (log link) for watch time.

    Both are proper for the mean, which is what rewards need (the paper regresses by MSE; contract.md allows these).

    Args:
      predicted: [..., S, M] raw outputs of the critic. feedback: [..., M, S]. reward_scale: [S].
    """
    raw = jnp.moveaxis(predicted, -2, -1)
    binary = optax.sigmoid_binary_cross_entropy(raw[..., : types.WATCH_TIME], feedback[..., : types.WATCH_TIME])
    eta = jnp.clip(raw[..., types.WATCH_TIME :], -8.0, _MAX_LOG_WATCH)
    watched = feedback[..., types.WATCH_TIME :] / reward_scale[types.WATCH_TIME]
    return jnp.concatenate([binary, jnp.exp(eta) - watched * eta], axis=-1)


def expected_feedback(predicted: chex.Array, reward_scale: chex.Array) -> chex.Array:
    """Raw outputs [..., S, M] -> means in the signals' units (probabilities, seconds), [..., S, M]."""
    binary = jax.nn.sigmoid(predicted[..., : types.WATCH_TIME, :])
    seconds = jnp.exp(jnp.clip(predicted[..., types.WATCH_TIME :, :], -8.0, _MAX_LOG_WATCH))
    return jnp.concatenate([binary, reward_scale[types.WATCH_TIME] * seconds], axis=-2)


def rewards(config: AgentConfig, feedback: chex.Array, reward_scale: chex.Array) -> chex.Array:
    """Feedback [..., S], or its expectation -> normalised rewards of the agents [..., N]; a hate counts negative."""
    index = jnp.asarray(config.reward_indices)
    return jnp.asarray(config.signs) * feedback[..., index] / reward_scale[index]


def stay_probability(out: CriticOutput, w: chex.Array) -> chex.Array:
    """Probability [...] of another request after the exposure w [..., M]."""
    return jax.nn.sigmoid(out.stay_base + jnp.sum(w * out.stay_effect, axis=-1))


def video_values(
    config: AgentConfig, out: CriticOutput, value: chex.Array, stay: chex.Array, reward_scale: chex.Array
) -> chex.Array:
    """q_i(s, c) [..., N, M]: the immediate reward, and what the video's effect on staying is worth.

    To first order around the current exposure, a video moves the chance of another request by p (1 - p) times its
    effect on the log-odds, and another request is worth gamma V_i.

    Args:
      out: critics for M videos. value: [..., N], V_i(s). stay: [...], p at the current exposure.
    """
    reward = rewards(config, jnp.moveaxis(expected_feedback(out.feedback, reward_scale), -2, -1), reward_scale)
    slope = config.discount * (stay * (1.0 - stay))[..., None] * value  # [..., N]
    return jnp.moveaxis(reward, -1, -2) + slope[..., None] * out.stay_effect[..., None, :]


def slate_values(base: chex.Array, q: chex.Array, w: chex.Array) -> chex.Array:
    """Q_i(s, w) = b_i(s) + sum_c w_c q_i(s, c): base [..., N], q [..., N, M], w [..., M] -> [..., N]."""
    return base + jnp.einsum("...nm,...m->...n", q, w)


def td_targets(reward: chex.Array, next_value: chex.Array, terminated: chex.Array, discount: float) -> chex.Array:
    """r + gamma (1 - terminated) V(s'): reward and next_value [..., N], terminated [...]."""
    return reward + discount * jnp.where(terminated, 0.0, 1.0)[..., None] * next_value


def policy_objective(scores: chex.Array, q: chex.Array, slate: int, temperature: float) -> chex.Array:
    """Value of the relaxed exposure of scores, with an entropy bonus: sum_c w_c q_c + tau H(w), divided by K.

    Its maximiser over scores is q / tau plus a constant, so an actor is taught the order of all candidates and not only
    of those near the cut.

    Args:
      scores, q: [..., C].
    """
    w = exposure.soft_top_k(scores, slate, 1.0)
    return (jnp.sum(w * q, axis=-1) + temperature * exposure.entropy(w)) / slate
