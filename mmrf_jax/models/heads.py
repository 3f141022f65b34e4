"""Heads that predict feedback and staying from a user state, and their losses.

One batched product of a few user vectors with the item encodings scores all candidates.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from mmrf_jax import types

_MAX_LOG_WATCH = 5.0  # of watch time divided by its standard deviation
_CEILING, _CEILING_PACE = 0.5, 4.0  # initial ceilings are sigmoid(2) = .88; the pace makes their log-odds move faster


class UserVectors(nn.Module):
    """n user vectors in the space of item encodings, from a state and from reads of the memory.

    <state vector, e_c> + sum_lf g_lf (M_lf . e_c); the second part is linear attention over the user's history.
    """

    num: int

    @nn.compact
    def __call__(self, state: chex.Array, memory_mean: chex.Array) -> chex.Array:
        """Map a state [..., d] (or [..., n, d], one per vector) and memory means [..., L, F, D] to [..., n, D].

        Vectors from the state start at 0: a random user x video product is unlearned only where logs have such pairs.
        """
        init, dim = nn.initializers.zeros, memory_mean.shape[-1]
        if state.ndim == memory_mean.ndim - 1:
            kernel = self.param("kernel", init, (self.num, state.shape[-1], dim), jnp.float32)
            from_state = jnp.einsum("...nd,ndo->...no", state, kernel)
        else:
            from_state = nn.Dense(self.num * dim, kernel_init=init)(state).reshape(*state.shape[:-1], self.num, dim)
        reads = memory_mean.reshape(*memory_mean.shape[:-3], -1, memory_mean.shape[-1])
        gate = self.param("reads", nn.initializers.normal(0.1), (self.num, reads.shape[-2]), jnp.float32)
        return from_state + jnp.einsum("nf,...fd->...nd", gate, reads)


@struct.dataclass
class Prediction:
    """Predictions of the heads for one request; `...` are batch axes."""

    feedback: chex.Array  # [..., S, M] raw predictions of the M videos: log-odds, and log of normalised watch time
    extra: chex.Array  # [..., E, M] raw predictions without a loss here
    continue_logit: chex.Array  # [...] log-odds of another request, before the slate's effect
    continue_item_logit: chex.Array  # [..., M] change of those log-odds by each video when shown


class FeedbackHeads(nn.Module):
    """One head per signal, plus staying or leaving.

    Attributes:
      extra: number of raw predictions in addition to those of the signals.
      ceilings: whether the probability of a binary signal stays below a learned bound, because a fraction of videos is
        swiped away unseen however well they match. The log-odds of shown videos flatten towards the bound. Without one,
        the model extrapolates this flat slope to videos unlike those and overestimates their probabilities.
    """

    extra: int = 0
    ceilings: bool = False

    @nn.compact
    def __call__(self, z: chex.Array, memory_mean: chex.Array, items: chex.Array) -> Prediction:
        """Predict from z [..., Z], memory_mean [..., L, F, D] and items [..., M, D]."""
        num_signals = len(types.SIGNALS)
        vectors = UserVectors(num_signals + self.extra, name="signals")(
            jnp.concatenate([z, nn.gelu(nn.Dense(64, name="hidden")(z))], -1), memory_mean
        )
        # Initialised to the base rates of the first log.
        prior = self.param("prior", nn.initializers.zeros, (num_signals + self.extra, 1), jnp.float32)
        products = jnp.einsum("...nd,...md->...nm", vectors, items)
        raw = jax.lax.broadcast_to_rank(prior, products.ndim) + products
        free, extra = raw[..., :num_signals, :], raw[..., num_signals:, :]
        feedback = free
        if self.ceilings:
            ceiling = self.param("ceiling", nn.initializers.constant(_CEILING), (num_signals - 1, 1), jnp.float32)
            binary = below(free[..., : types.WATCH_TIME, :], _CEILING_PACE * ceiling)
            feedback = jnp.concatenate([binary, free[..., types.WATCH_TIME :, :]], axis=-2)
        # Staying is learned from few numbers per video: its log-odds of feedback, before ceilings, and its encoding,
        # with weights shared by all users. Free user x video effects fit noise: one slate moves the odds by little.
        few = jax.lax.stop_gradient(free - jax.lax.broadcast_to_rank(prior[:num_signals], free.ndim))
        theta = self.param("stay_signals", nn.initializers.zeros, (num_signals,), jnp.float32)
        direct = self.param("stay_items", nn.initializers.zeros, (items.shape[-1],), jnp.float32)
        effect = jnp.einsum("n,...nm->...m", theta, few) + jax.lax.stop_gradient(items) @ direct
        state = jax.lax.stop_gradient(z)
        stay = nn.Dense(1, name="stay")(nn.gelu(nn.Dense(32, name="stay_hidden")(state)))[..., 0]
        return Prediction(feedback, extra, stay, effect)


def below(log_odds: chex.Array, ceiling: chex.Array) -> chex.Array:
    """Return the log-odds of c σ(log_odds), a probability below c = σ(ceiling)."""

    def least(x):
        return jax.lax.broadcast_to_rank(jax.nn.log_sigmoid(x), log_odds.ndim)

    return log_odds + least(ceiling) - jax.nn.softplus(log_odds + least(-ceiling))


def prior(feedback_mean: chex.Array, feedback_std: chex.Array) -> chex.Array:
    """Return the raw predictions [S] of the mean of each signal."""
    rate = jnp.clip(feedback_mean, 1e-5, None)
    log_odds = jnp.log(rate / (1 - jnp.minimum(rate, 0.999)))
    return jnp.where(jnp.arange(len(rate), dtype=jnp.int32) == types.WATCH_TIME, jnp.log(rate / feedback_std), log_odds)


def continue_probability(out: Prediction, w: chex.Array) -> chex.Array:
    """Return p_stay(s, w) = σ(l(s) + Σ_c w_c l_c) [...], the probability of another request after w [..., M]."""
    return jax.nn.sigmoid(out.continue_logit + jnp.sum(w * out.continue_item_logit, axis=-1))


def continuation_loss(out: Prediction, w: chex.Array, continues: chex.Array) -> chex.Array:
    """Compute −log p of whether the session went on after an exposure, p = p_stay(s, w) or 1 − p_stay(s, w).

    Equation (2) of docs/update.md.

    Args:
      out: predictions for M videos.
      w: [..., M], the exposure.
      continues: [...], 1 if there was another request, 0 if the user left; or a probability.
    """
    logit = out.continue_logit + jnp.sum(w * out.continue_item_logit, axis=-1)
    return optax.sigmoid_binary_cross_entropy(logit, continues)


def feedback_loss(predicted: chex.Array, feedback: chex.Array, reward_scale: chex.Array) -> chex.Array:
    """Compute the loss of each signal [..., M, S]: Bernoulli if binary, quasi-Poisson (log link) for watch time.

    Equation (1) of docs/update.md. Both are proper for the mean, which rewards need (the paper regresses by MSE).

    Args:
      predicted: [..., S, M] raw outputs of the critic.
      feedback: [..., M, S].
      reward_scale: [S].
    """
    raw = jnp.moveaxis(predicted, -2, -1)
    binary = optax.sigmoid_binary_cross_entropy(raw[..., : types.WATCH_TIME], feedback[..., : types.WATCH_TIME])
    eta = jnp.clip(raw[..., types.WATCH_TIME :], -8.0, _MAX_LOG_WATCH)
    watched = feedback[..., types.WATCH_TIME :] / reward_scale[types.WATCH_TIME]
    return jnp.concatenate([binary, jnp.exp(eta) - watched * eta], axis=-1)


def expected_feedback(predicted: chex.Array, reward_scale: chex.Array) -> chex.Array:
    """Convert raw outputs [..., S, M] to means in the signals' units (probabilities, seconds), [..., S, M]."""
    binary = jax.nn.sigmoid(predicted[..., : types.WATCH_TIME, :])
    seconds = jnp.exp(jnp.clip(predicted[..., types.WATCH_TIME :, :], -8.0, _MAX_LOG_WATCH))
    return jnp.concatenate([binary, reward_scale[types.WATCH_TIME] * seconds], axis=-2)
