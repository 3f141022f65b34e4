"""Heads that predict feedback and staying from a user state, and their losses.

One batched product of a few user vectors with the item encodings scores all candidates.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct

from mmrf_jax.models import products
from mmrf_jax.models.kinds import join, take
from mmrf_jax.signals import Signals

_MAX_LOG = 5.0  # of an amount divided by its standard deviation
_CEILING, _CEILING_PACE = 0.5, 4.0  # initial ceilings are sigmoid(2) = .88; the pace makes their log-odds move faster


class UserVectors(nn.Module):
    """n user vectors in the space of item encodings, from a state and from reads of the memory.

    <state vector, e_c> + sum_lf g_lf (M_lf . e_c); the second part is linear attention over the user's history.
    """

    num: int
    dtype: str = "float32"  # of the operands of products

    @nn.compact
    def __call__(self, state: chex.Array, memory_mean: chex.Array) -> chex.Array:
        """Map a state [..., d] (or [..., n, d], one per vector) and memory means [..., L, F, D] to [..., n, D].

        Vectors from the state start at 0: a random user x video product is unlearned only where logs have such pairs.
        """
        init, dim = nn.initializers.zeros, memory_mean.shape[-1]
        if state.ndim == memory_mean.ndim - 1:
            kernel = self.param("kernel", init, (self.num, state.shape[-1], dim), jnp.float32)
            from_state = products.einsum("...nd,ndo->...no", state, kernel, self.dtype)
        else:
            from_state = products.dense(self.num * dim, self.dtype, kernel_init=init)(state)
            from_state = from_state.reshape(*state.shape[:-1], self.num, dim)
        reads = memory_mean.reshape(*memory_mean.shape[:-3], -1, memory_mean.shape[-1])
        gate = self.param("reads", nn.initializers.normal(0.1), (self.num, reads.shape[-2]), jnp.float32)
        return from_state + products.einsum("nf,...fd->...nd", gate, reads, self.dtype)


@struct.dataclass
class Prediction:
    """Predictions of the heads for one request; `...` are batch axes."""

    feedback: chex.Array  # [..., S, M] raw predictions of the M videos, see `feedback_loss`
    extra: chex.Array  # [..., E, M] raw predictions without a loss here
    continue_logit: chex.Array  # [...] log-odds of another request, before the slate's effect
    continue_item_logit: chex.Array  # [..., M] change of those log-odds by each video when shown


class FeedbackHeads(nn.Module):
    """One head per signal, plus staying or leaving.

    Attributes:
      all_signals: the S signals.
      extra: number of raw predictions in addition to those of the signals.
      ceilings: whether the probability of a binary signal stays below a learned bound, because a fraction of videos is
        swiped away unseen however well they match. The log-odds of shown videos flatten towards the bound. Without one,
        the model extrapolates this flat slope to videos unlike those and overestimates their probabilities.
      dtype: of the operands of products (`models.products`).
    """

    all_signals: Signals
    extra: int = 0
    ceilings: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        z: chex.Array,
        memory_mean: chex.Array,
        items: chex.Array,
        others: chex.Array | None = None,
        own: chex.Array | None = None,
    ) -> Prediction:
        """Predict from z [..., Z], memory_mean [..., L, F, D] and items [..., M, D].

        Args:
          z: user states.
          memory_mean: means of the user memories.
          items: encodings of M videos.
          others: [..., J, M], what others think of the videos; they enter all predictions. None for none.
          own: [S], 1 for the signals to predict; the prediction of others is their prior. None for all.
        """
        num_signals, binary = len(self.all_signals), self.all_signals.binary
        dense = functools.partial(products.dense, dtype=self.dtype)
        vectors = UserVectors(num_signals + self.extra, self.dtype, name="signals")(
            jnp.concatenate([z, nn.gelu(dense(64, name="hidden")(z))], -1), memory_mean
        )
        # Initialised to the base rates of the first log.
        prior = self.param("prior", nn.initializers.zeros, (num_signals + self.extra, 1), jnp.float32)
        scores = products.einsum("...nd,...md->...nm", vectors, items, self.dtype)
        if others is not None:
            weights = self.param("scores", nn.initializers.zeros, (scores.shape[-2], others.shape[-2]), jnp.float32)
            scores += jnp.einsum("nj,...jm->...nm", weights, others)
        if own is not None:
            scores *= own[:, None]
        raw = jax.lax.broadcast_to_rank(prior, scores.ndim) + scores
        free, extra = raw[..., :num_signals, :], raw[..., num_signals:, :]
        feedback = free
        if self.ceilings and binary:
            ceiling = self.param("ceiling", nn.initializers.constant(_CEILING), (len(binary), 1), jnp.float32)
            numeric = self.all_signals.numeric
            bounded = below(take(free, binary, -2), _CEILING_PACE * ceiling)
            feedback = join({binary: bounded, numeric: take(free, numeric, -2)}, axis=-2)
        # Staying is learned from few numbers per video: its log-odds of feedback, before ceilings, and its encoding,
        # with weights shared by all users. Free user x video effects fit noise: one slate moves the odds by little.
        few = jax.lax.stop_gradient(free - jax.lax.broadcast_to_rank(prior[:num_signals], free.ndim))
        theta = self.param("stay_signals", nn.initializers.zeros, (num_signals,), jnp.float32)
        direct = self.param("stay_items", nn.initializers.zeros, (items.shape[-1],), jnp.float32)
        effect = jnp.einsum("n,...nm->...m", theta, few) + jax.lax.stop_gradient(items) @ direct
        if others is not None:
            theirs = self.param("stay_scores", nn.initializers.zeros, (others.shape[-2],), jnp.float32)
            effect += jnp.einsum("j,...jm->...m", theirs, others)
        state = jax.lax.stop_gradient(z)
        logit = dense(1, name="stay")(nn.gelu(dense(32, name="stay_hidden")(state)))[..., 0]
        return Prediction(feedback, extra, logit, effect)


def below(log_odds: chex.Array, ceiling: chex.Array) -> chex.Array:
    """Return the log-odds of c σ(log_odds), a probability below c = σ(ceiling)."""

    def least(x):
        return jax.lax.broadcast_to_rank(jax.nn.log_sigmoid(x), log_odds.ndim)

    return log_odds + least(ceiling) - jax.nn.softplus(log_odds + least(-ceiling))


def prior(signals: Signals, feedback_mean: chex.Array, feedback_std: chex.Array) -> chex.Array:
    """Return the raw predictions [S] of the mean of each signal."""
    rate = jnp.clip(feedback_mean, 1e-5, None)
    raw = jnp.log(rate / (1 - jnp.minimum(rate, 0.999)))
    kinds = np.array([signal.kind for signal in signals.signals])
    if signals.amounts:
        raw = jnp.where(np.isin(kinds, ("duration", "count")), jnp.log(rate / feedback_std), raw)
    if "value" in kinds:
        raw = jnp.where(kinds == "value", feedback_mean / jnp.maximum(feedback_std, 1e-3), raw)
    return raw


def continue_prob(out: Prediction, w: chex.Array) -> chex.Array:
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


def feedback_loss(
    signals: Signals, predicted: chex.Array, feedback: chex.Array, reward_scale: chex.Array
) -> chex.Array:
    """Compute the loss of each signal [..., M, S] by its kind.

    Equation (1) of docs/update.md. Raw predictions are log-odds of binary signals (Bernoulli), the logarithm of the
    mean of durations and counts (quasi-Poisson) and the mean of values (Gaussian with unit variance), the last three
    divided by `reward_scale`. All losses are proper for the mean, which rewards need (the paper regresses by MSE).

    Args:
      predicted: [..., S, M] raw outputs of the critic.
      feedback: [..., M, S].
      reward_scale: [S].
    """
    raw = jnp.moveaxis(predicted, -2, -1)
    binary, amounts, values = signals.binary, signals.amounts, signals.of_kind("value")

    def normalised(where):
        return take(feedback, where, -1) / jax.lax.broadcast_to_rank(take(reward_scale, where, 0), feedback.ndim)

    eta = jnp.clip(take(raw, amounts, -1), -8.0, _MAX_LOG)
    return join(
        {
            binary: optax.sigmoid_binary_cross_entropy(take(raw, binary, -1), take(feedback, binary, -1)),
            amounts: jnp.exp(eta) - normalised(amounts) * eta,
            values: 0.5 * (take(raw, values, -1) - normalised(values)) ** 2,
        },
        axis=-1,
    )


def expected_feedback(signals: Signals, predicted: chex.Array, reward_scale: chex.Array) -> chex.Array:
    """Convert raw outputs [..., S, M] to means in the signals' units (probabilities, seconds, …), [..., S, M]."""
    binary, amounts, values = signals.binary, signals.amounts, signals.of_kind("value")

    def scale(where):
        return jax.lax.broadcast_to_rank(take(reward_scale, where, 0)[:, None], predicted.ndim)

    return join(
        {
            binary: jax.nn.sigmoid(take(predicted, binary, -2)),
            amounts: scale(amounts) * jnp.exp(jnp.clip(take(predicted, amounts, -2), -8.0, _MAX_LOG)),
            values: scale(values) * take(predicted, values, -2),
        },
        axis=-2,
    )
