"""Feedback that a run predicts for given videos at each request: by its feedback model and by its agents' critics."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import types
from mmrf_jax.agents import registry
from mmrf_jax.agents.mmrf import acting, encoding
from mmrf_jax.models import heads
from mmrf_jax.models.feedback_model import counterfactuals, network
from mmrf_jax.parallel import programs
from mmrf_jax.training import steps, train_state
from mmrf_jax.training.train_state import TrainState


def exposed_videos(batch: types.SessionBatch) -> chex.Array:
    """Return the ids [B, T+1, K] of the exposed videos."""
    return jnp.take_along_axis(jnp.asarray(batch.candidates), jnp.asarray(batch.slate), axis=-1)


@functools.partial(jax.jit, static_argnames=("plan", "at_random"))
def predict_feedback(
    state: TrainState,
    batch: types.SessionBatch,
    videos: chex.Array,
    items: types.Items,
    plan: steps.TrainConfig,
    at_random: bool = False,
) -> dict[str, chex.Array]:
    """Predict the expected feedback of videos [B, T+1, M].

    Args:
      at_random: whether the feedback model predicts for random exposures, where requests say so.

    Returns:
      {predictor: [B, T+1, M, S]} for each of `plan.predictors`; with a feedback model also "levels" [B, T+1, M, Q].
    """
    out = {}
    if "agents" in plan.predictors:
        agents = state.agents
        encoder = agents.params["encoder"]
        encoded = encoding.encode_batch(plan.agents, encoder, agents.tables, batch, items, videos)
        if plan.agents.own_critics:
            parts = (agents.params["critic"], agents.params["actor"], encoded.user, encoded.unseen)
            critic = acting.apply_critics(plan.agents, *parts)
        else:
            critic = registry.get(plan.method).critic(plan.agents)
            critic = critic.apply(agents.params["critic"], *encoded.user, encoded.unseen)
        expected = heads.expected_feedback(plan.agents.all_signals, critic.feedback, agents.reward_scale)
        out["agents"] = jnp.moveaxis(expected, -2, -1)
    if plan.use_feedback_model:
        model = train_state.model_of(state)
        encoded = network.encode_batch(plan.feedback, model, batch, items, videos, at_random)
        predicted = network.predict(plan.feedback, model.params, *encoded.user, encoded.unseen)
        context = types.as_if_at_random(batch.context) if at_random else batch.context
        predicted = network.calibrated(plan.feedback, predicted, model.calibration, context)
        out["model"] = network.expected(plan.feedback, predicted, model.scale)
        out["levels"] = jnp.moveaxis(predicted.extra, -2, -1).mean(axis=0)
    return out


@programs.program(calls="some", static_argnames="plan")
def score_and_predict(
    state: TrainState, batch: types.SessionBatch, items: types.Items, plan: steps.TrainConfig
) -> dict[str, chex.Array]:
    """Compute everything that offline evaluation needs from a batch of segments, in one program.

    Returns:
      "scores" [B, T+1, N, C] of all candidates, and `predict_feedback` of the exposed videos.
    """
    scores = registry.score_candidates(state.agents, batch, items, plan.agents, plan.method)
    return {"scores": scores} | predict_feedback(state, batch, exposed_videos(batch), items, plan)


@functools.partial(jax.jit, static_argnames="plan")
def predict_uncertainty(
    state: TrainState,
    batch: types.SessionBatch,
    videos: chex.Array,
    items: types.Items,
    plan: steps.TrainConfig,
) -> chex.Array:
    """Return the feedback model's uncertainty [B, T+1, M, S] about videos [B, T+1, M]."""
    model = train_state.model_of(state)
    return counterfactuals.uncertainty(model, batch, videos, items, plan.feedback, model.key)
