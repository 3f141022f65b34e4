"""Actors and critics: heads over the shared user state z and item encodings e.

One batched product of a few user vectors with the item encodings scores all candidates.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from mmrf_jax import types
from mmrf_jax.agents.mmrf.collaboration import Collaboration
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.models import heads, products
from mmrf_jax.models.heads import UserVectors

_MAIN_VECTORS = 4  # user vectors of the main agent, in addition to the auxiliary agents' scores
_SCORE_SCALE = 0.2  # of auxiliary scores where they enter the main actor


def _scale_gradient(x: chex.Array, weight: float) -> chex.Array:
    """Return x with its gradient multiplied by `weight`."""
    return x * weight + jax.lax.stop_gradient(x * (1.0 - weight))


@struct.dataclass
class ActorOutput:
    """Outputs of the actors for one request; `...` are batch axes."""

    scores: chex.Array  # [..., N, C], ordered as the agents, the main one last
    attention: chex.Array  # [..., heads, N, N] between agents


class HiddenScores(nn.Module):
    """Scores of each candidate by an MLP with one hidden layer, over a user vector and an encoding."""

    width: int
    dtype: str = "float32"  # of the operands of products

    @nn.compact
    def __call__(self, vectors: chex.Array, items: chex.Array) -> chex.Array:
        """Map vectors [..., n, D], each with separate output weights, and items [..., C, D] to [..., n, C]."""
        user = products.dense(self.width, self.dtype, name="user")(vectors)[..., None, :]
        video = products.dense(self.width, self.dtype, use_bias=False, name="video")(items)[..., None, :, :]
        out = self.param("out", nn.initializers.normal(0.01), (vectors.shape[-2], self.width), jnp.float32)
        return products.einsum("nm,...ncm->...nc", out, nn.gelu(user + video), self.dtype)


def _by_agent(module: type[nn.Module], in_axes: Any, out_axes: Any = 0) -> Any:
    """Return a module that is applied to each agent's inputs with that agent's parameters, leading axis N."""
    axes = {"in_axes": in_axes, "out_axes": out_axes}
    return nn.vmap(module, variable_axes={"params": 0}, split_rngs={"params": True}, **axes)


class Actor(nn.Module):
    """The N actors, or only the main one (`AgentConfig.one_actor`)."""

    config: AgentConfig

    @nn.compact
    def __call__(
        self,
        z: chex.Array,
        memory_mean: chex.Array,
        items: chex.Array,
        base: chex.Array | None = None,
        weight: chex.Array | None = None,
    ) -> ActorOutput:
        """Compute the scores of all agents for all candidates.

        Args:
          z: [..., Z]; for `own` critics [..., N, Z], by each agent's encoder.
          memory_mean: [..., L, F, D]; for `own` critics [..., N, L, F, D].
          items: [..., C, D]; for `own` critics [..., N, C, D].
          base: [..., A, C], added to each agent's score (`acting.critic_scores`); None for nothing.
          weight: [..., C], number of candidates that each represents (`ops.relaxed_top_k`); None for 1 each.
        """
        c = self.config
        n, dense = c.num_actors, functools.partial(products.dense, dtype=c.compute_dtype)
        if c.own_critics:
            h = _by_agent(nn.Dense, -2, -2)(c.agent_dim, name="agent_states")(z)
        else:
            h = dense(n * c.agent_dim, name="agent_states")(z).reshape(*z.shape[:-1], n, c.agent_dim)
        if c.collaborates:
            gather = Collaboration(c.heads, c.compute_dtype, name="collaboration")
            x, attention = gather(h)
            # The main agent gathers from states through which its value flows back with weight lambda.
            states = jnp.concatenate(
                [_scale_gradient(h[..., :-1, :], c.main_objective_weight), h[..., -1:, :]], axis=-2
            )
            x = jnp.concatenate([x[..., :-1, :], gather(states)[0][..., -1:, :]], axis=-2)
            h = jnp.concatenate([h, x], axis=-1)
        else:
            attention = jnp.zeros((*h.shape[:-2], c.heads, n, n), jnp.float32)
        if c.communication == "shared_latent":
            known = z.reshape(*z.shape[:-2], -1) if c.own_critics else z
            signal = dense(c.agent_dim, name="signal")(known)[..., None, :]
            h = jnp.concatenate([h, jnp.broadcast_to(signal, h.shape)], axis=-1)
        main_scores, auxiliary = (self._own_products if c.own_critics else self._products)(h, memory_mean, items)
        # Centred, an actor's learned part gives the main agent only differences between candidates. It is linear in
        # the encodings, so padding by the mean encoding, as services do, changes nothing.
        shares = None if weight is None else jnp.broadcast_to(weight[..., None, :], auxiliary.shape)
        aux_scores = auxiliary - jnp.average(auxiliary, axis=-1, weights=shares, keepdims=True)
        if base is not None:
            auxiliary, aux_scores = auxiliary + base[..., :-1, :], aux_scores + base[..., :-1, :]

        def add(score):
            return score if base is None else score + base[..., -1:, :]

        if n == 1:
            return ActorOutput(add(self._score_mixer(main_scores, auxiliary, h[..., -1, :])), attention)
        # The main value reaches an auxiliary actor through this path, weighted by lambda.
        aux_scores = _scale_gradient(aux_scores, c.main_objective_weight)
        main = self._score_mixer(main_scores, aux_scores if c.collaborates else auxiliary[..., :0, :], h[..., -1, :])
        return ActorOutput(jnp.concatenate([auxiliary, add(main)], axis=-2), attention)

    def _products(self, h: chex.Array, memory_mean: chex.Array, items: chex.Array) -> tuple[chex.Array, chex.Array]:
        """Compute the main agent's products [..., 4, C] and the auxiliary scores [..., N - 1, C] from states h."""
        c = self.config
        vectors = UserVectors(_MAIN_VECTORS, c.compute_dtype, name="main")(h[..., -1, :], memory_mean)
        if c.num_actors > 1:
            auxiliary = UserVectors(c.num_actors - 1, c.compute_dtype, name="auxiliary")(h[..., :-1, :], memory_mean)
            vectors = jnp.concatenate([vectors, auxiliary], axis=-2)
        # One pass over the items, the costliest array here.
        scores = products.einsum("...nd,...cd->...nc", vectors, items, c.compute_dtype)
        if c.score_hidden is not None:
            scores += HiddenScores(c.score_hidden, c.compute_dtype, name="hidden")(vectors, items)
        return scores[..., :_MAIN_VECTORS, :], scores[..., _MAIN_VECTORS:, :]

    def _own_products(self, h: chex.Array, memory_mean: chex.Array, items: chex.Array) -> tuple[chex.Array, chex.Array]:
        """Compute `_products` with each agent's own memory [..., N, L, F, D] and encodings [..., N, C, D]."""
        main = UserVectors(_MAIN_VECTORS, name="main")(h[..., -1, :], memory_mean[..., -1, :, :, :])
        main = jnp.einsum("...nd,...cd->...nc", main, items[..., -1, :, :])
        if self.config.num_actors == 1:
            return main, main[..., :0, :]
        each = _by_agent(UserVectors, (-2, -4), -3)(1, name="auxiliary")
        vectors = each(h[..., :-1, :], memory_mean[..., :-1, :, :, :])[..., 0, :]
        return main, jnp.einsum("...nd,...ncd->...nc", vectors, items[..., :-1, :, :])

    def _score_mixer(self, main_scores: chex.Array, aux_scores: chex.Array, state: chex.Array) -> chex.Array:
        """Compute the main score [..., 1, C] from its products [..., 4, C] and auxiliary scores [..., N - 1, C]."""
        inputs = jnp.concatenate([main_scores, _SCORE_SCALE * aux_scores], axis=-2)
        dtype = self.config.compute_dtype
        gate = products.dense(inputs.shape[-2], dtype, name="state_gate", kernel_init=nn.initializers.zeros)(state)
        linear = jnp.einsum("...i,...ic->...c", gate, inputs)
        w1 = self.param("mix_in", nn.initializers.lecun_normal(), (16, inputs.shape[-2]), jnp.float32)
        b1 = self.param("mix_bias", nn.initializers.zeros, (16, 1), jnp.float32)
        w2 = self.param("mix_out", nn.initializers.normal(0.1), (16,), jnp.float32)
        hidden = nn.gelu(
            products.einsum("mi,...ic->...mc", w1, inputs, dtype) + jax.lax.broadcast_to_rank(b1, inputs.ndim)
        )
        return (main_scores[..., 0, :] + linear + jnp.einsum("m,...mc->...c", w2, hidden))[..., None, :]


@struct.dataclass
class CriticOutput(heads.Prediction):
    """Outputs of the critics for one request: predictions and values; `...` are batch axes."""

    # For `own` critics, continue_logit [..., N] and continue_item_logit [..., N, M]: each agent predicts staying.
    reward_residual: chex.Array | None  # [..., N, M] reward beyond expected feedback; None if there is none
    slate_bias: chex.Array  # [..., 2, N] twin b_i(s)
    value: chex.Array  # [..., 2, N] twin V_i(s) of the current policy


def blend(out: CriticOutput, model: types.FeedbackPrediction, weight: float) -> CriticOutput:
    """Blend the critics' r̂ and p̂_stay with a feedback model's: raw predictions averaged, the model's with `weight`.

    These are the r̂ and p̂_stay of Q_i = Σ_c w_c r̂_i,c + γ p̂_stay V_i. Predictors that were fitted separately have
    different errors, and these are largest on unshown videos.
    """

    def mix(own, theirs):
        return (1.0 - weight) * own + weight * theirs

    return dataclasses.replace(
        out,
        feedback=mix(out.feedback, model.feedback),
        continue_logit=mix(out.continue_logit, model.continue_logit),
        continue_item_logit=mix(out.continue_item_logit, model.continue_item_logit),
    )


class Critic(nn.Module):
    """One critic per agent, additive over the slate: Q_i(s, w) = b_i(s) + sum_c w_c q_i(s, c).

    All agents share the predictions of feedback and staying, unless `AgentConfig.critics` is `own` (`OwnCritics`).
    """

    config: AgentConfig

    @nn.compact
    def __call__(
        self,
        z: chex.Array,
        memory_mean: chex.Array,
        items: chex.Array,
        scores: chex.Array | None = None,
        own: chex.Array | None = None,
    ) -> CriticOutput:
        """Predict from z [..., Z], memory_mean [..., L, F, D] and items [..., M, D].

        Args:
          z: user states.
          memory_mean: means of the user memories.
          items: encodings of M videos.
          scores: [..., J, M], what other agents think of the videos; only for `own` critics.
          own: [S] mask of the signals of a single agent, which this critic is then of; else it is of all agents.
        """
        c = self.config
        if c.own_critics and own is None:
            return OwnCritics(c, name="agents")(z, memory_mean, items, scores)
        n, dense = c.num_agents if own is None else 1, functools.partial(products.dense, dtype=c.compute_dtype)
        predicted = heads.FeedbackHeads(c.all_signals, dtype=c.compute_dtype, name="heads")(
            z, memory_mean, items, scores, own
        )
        state = jax.lax.stop_gradient(z)
        hidden = nn.gelu(dense(64, name="value_hidden")(state))
        values = dense(4 * n, kernel_init=nn.initializers.zeros, name="values")(hidden)
        values = values.reshape(*values.shape[:-1], 2, 2, n)
        reward_residual = None
        if c.rewards_differ:
            dim = items.shape[-1]
            vectors = dense(n * dim, kernel_init=nn.initializers.zeros, name="extra_reward")(state)
            vectors = vectors.reshape(*vectors.shape[:-1], n, dim)
            reward_residual = products.einsum(
                "...nd,...md->...nm", vectors, jax.lax.stop_gradient(items), c.compute_dtype
            )
        return CriticOutput(
            predicted.feedback,
            predicted.extra,
            predicted.continue_logit,
            predicted.continue_item_logit,
            reward_residual,
            values[..., 0, :, :],
            values[..., 1, :, :],
        )


class Messages(nn.Module):
    """What an agent's own critic receives of the others' states: by attention, or the vector that all agents share."""

    config: AgentConfig

    @nn.compact
    def __call__(self, z: chex.Array) -> chex.Array:
        """Map the user states by each agent's encoder, [..., N, Z], to what each agent receives, [..., N, E].

        No gradient goes back into z: an agent's encoder learns from its own reward alone.
        """
        c, z = self.config, jax.lax.stop_gradient(z)
        if c.collaborates:
            h = _by_agent(nn.Dense, -2, -2)(c.agent_dim, name="agent_states")(z)
            return Collaboration(c.heads, c.compute_dtype, name="collaboration")(h)[0]
        if c.communication == "shared_latent":
            signal = nn.Dense(c.agent_dim, name="signal")(z.reshape(*z.shape[:-2], -1))
            return jnp.broadcast_to(signal[..., None, :], (*z.shape[:-1], c.agent_dim))
        return z[..., :0]


class OwnCritics(nn.Module):
    """A separate `Critic` for each agent, which predicts the agent's signals and staying."""

    config: AgentConfig

    @nn.compact
    def __call__(
        self, z: chex.Array, memory_mean: chex.Array, items: chex.Array, scores: chex.Array | None
    ) -> CriticOutput:
        """Predict from what the agents' encoders say.

        Args:
          z: [..., N, Z] user states.
          memory_mean: [..., N, L, F, D], means of the user memories.
          items: [..., N, M, D], encodings of M videos.
          scores: [..., N - 1, M] of the auxiliary agents, for the main critic; None unless agents collaborate.

        Returns:
          Predictions as of `Critic`, each signal's by the agent that is rewarded by it; a signal of no agent has its
          mean in the first log. Each agent predicts staying, with the axis N after those of requests.
        """
        c = self.config
        if (scores is not None) != c.collaborates:
            raise ValueError("own critics take the auxiliary agents' scores exactly if agents collaborate")
        z = jnp.concatenate([z, Messages(c, name="messages")(z)], axis=-1)
        given: tuple[Any, Any] = (None, None)
        if scores is not None:
            main = jnp.arange(c.num_agents) == c.num_agents - 1
            given = jnp.where(main[:, None, None], scores[..., None, :, :], 0.0), -3
        own = np.asarray(c.own_signals, np.float32)
        each = _by_agent(Critic, (-2, -4, -3, given[1], 0))(c, name="each")
        out = each(z, memory_mean, items, given[0], jnp.asarray(own))
        owner = own.argmax(axis=0)
        return CriticOutput(
            feedback=jnp.stack([out.feedback[agent, ..., s, :] for s, agent in enumerate(owner)], axis=-2),
            extra=out.extra[0],
            continue_logit=jnp.moveaxis(out.continue_logit, 0, -1),
            continue_item_logit=jnp.moveaxis(out.continue_item_logit, 0, -2),
            reward_residual=None,
            slate_bias=jnp.moveaxis(out.slate_bias[..., 0], 0, -1),
            value=jnp.moveaxis(out.value[..., 0], 0, -1),
        )
