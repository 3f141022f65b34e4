"""Shared parts of supervised rankers: regression of feedback on shown videos, and a rule that ranks by predictions.

They have the encoders, the logs and the number of updates of MMRF, but no long-term value: staying is not learned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax.numpy as jnp
from flax import linen as nn

from mmrf_jax import types
from mmrf_jax.agents.mmrf import agent_state, policy
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.envs import rankers
from mmrf_jax.models import heads, representation

#: (config, raw predictions [..., S, C], scale [S]) -> scores [..., C].
Rank = Callable[[AgentConfig, chex.Array, chex.Array], chex.Array]


class Predictor(nn.Module):
    """Prediction heads instead of critics.

    Attributes:
      config: of the agents whose encoders are used.
      module: the heads, like `models.heads.FeedbackHeads`.
    """

    config: AgentConfig
    module: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, z: chex.Array, memory_mean: chex.Array, items: chex.Array) -> heads.Prediction:
        """Predict from z [..., Z], memory_mean [..., L, F, D] and items [..., M, D]."""
        return self.module(name="heads")(z, memory_mean, items)


def update(
    state: agent_state.AgentState,
    batch: types.SessionBatch,
    items: types.Items,
    config: AgentConfig,
    lr_scale: chex.Numeric = 1.0,
    simulated: types.CounterfactualSlates | None = None,
    *,
    critic: Callable[[AgentConfig], nn.Module],
    only_main: bool = False,
) -> tuple[agent_state.AgentState, dict[str, chex.Array]]:
    """Run one regression step of all signals, or the main one, on shown videos: an `agent_state.Update`."""
    del simulated
    masks = batch.loss_masks()
    exposed, count = masks.exposure, masks.counts().exposure
    signals = config.agent_signals[-1:] if only_main else config.all_signals.names
    index = jnp.array([config.all_signals.index(s) for s in signals])
    weights = jnp.asarray(config.loss_weights)[index]

    def loss_fn(params, encoded):
        out = critic(config).apply(params["critic"], *encoded.user, encoded.shown)
        loss = heads.feedback_loss(config.all_signals, out.feedback[:, :-1], batch.feedback[:, :-1], state.reward_scale)
        loss = jnp.einsum("btk,btks->s", exposed, loss[..., index]) / count
        return weights @ loss, {f"loss/{s}": loss[i] for i, s in enumerate(signals)}

    inputs = representation.gather(batch, items)
    state, metrics, grad_norm = agent_state.step(state, inputs, loss_fn, config, lr_scale)
    return state, metrics | {"grad_norm": grad_norm}


def make_supervised_ranker(
    state: agent_state.AgentState,
    items: types.Items,
    config: AgentConfig,
    temperature: float = 0.0,
    *,
    critic: Callable[[AgentConfig], nn.Module],
    rank: Rank,
) -> rankers.Ranker:
    """Return a policy that ranks by predictions; see `envs.rankers.Ranker`.

    Args:
      critic: the module of `state.params["critic"]`.
      rank: its scores are served with the spread 1 / tau of a trained actor's, so that sampled rankers explore equally.
    """
    served = policy.make_actor_ranker(state, items, config, temperature)
    params = {name: value for name, value in served.params.items() if name not in ("actor", "critics")}
    params |= {"critic": state.params["critic"], "scale": state.reward_scale}
    return dataclasses.replace(served, params=params, score=_score(config, critic, rank))


@functools.cache
def _score(config: AgentConfig, critic, rank):
    """Return the scoring function, the same object for equal arguments, so that jitted rollouts are compiled once."""

    def score(params, carry, request):
        z = policy.user_state(config, params, carry, request)
        out = critic(config).apply(params["critic"], z, carry.mean(), params["encodings"][request.candidates])
        scores = rank(config, out.feedback, params["scale"])
        scores = scores - scores.mean(axis=-1, keepdims=True)
        return scores / (config.temperature * (scores.std(axis=-1, keepdims=True) + 1e-6))

    return score


def by_main_signal(config: AgentConfig, raw: chex.Array, scale: chex.Array) -> chex.Array:
    """Rank by the main signal's raw prediction, such as the log of expected normalised watch time; a `Rank`."""
    del scale
    main = config.agent_signals[-1]
    predicted = raw[..., config.all_signals.index(main), :]
    return predicted if config.all_signals.sign(main) > 0 else -predicted


def scores(config: AgentConfig, raw: chex.Array, main: chex.Array) -> chex.Array:
    """Return columns [..., N, C]: raw predictions [..., S, C] of auxiliary agents' signals, then `main` [..., C]."""
    index = jnp.array([config.all_signals.index(s) for s in config.agent_signals[:-1]], jnp.int32)
    signs = jnp.array([terms[0][1] for terms in config.reward_terms[:-1]])[:, None]
    return jnp.concatenate([signs * raw[..., index, :], main[..., None, :]], axis=-2)
