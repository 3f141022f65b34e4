"""The settings of training and its steps: initialise, fit the feedback model, label, update (MMRF, Algorithm 1)."""

from __future__ import annotations

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import ops, random, types
from mmrf_jax.agents import registry
from mmrf_jax.agents.mmrf import agent_state
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.models import embeddings
from mmrf_jax.models.feedback_model import counterfactuals, fitting, network
from mmrf_jax.models.feedback_model.network import FeedbackConfig
from mmrf_jax.parallel import programs
from mmrf_jax.signals import Signals
from mmrf_jax.training import configs, train_state
from mmrf_jax.training.train_state import TrainState

_LAST_LR_SCALE = 0.05  # final factor of the cosine learning-rate schedule


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The static settings of training; hashable.

    Attributes:
      method: name in `agents.registry`.
      rounds: number of fit → label → update rounds.
      closed_loop: whether each round after the first has a new log, collected by the newest policy, or by the
        first policy if the method does not collect on-policy (`registry.Method.collects_on_policy`).
      slates: counterfactual slates per request, labelled by the feedback model.
      others: candidates per request in an update, in addition to those shown; None for all.
    """

    method: str
    agents: AgentConfig
    feedback: FeedbackConfig
    rounds: int
    closed_loop: bool
    slates: int
    others: int | None = None

    @property
    def use_feedback_model(self) -> bool:
        """Return whether a feedback model is fitted, for labels or for values."""
        return self.slates > 0 or self.agents.values_use_model

    @property
    def predictors(self) -> tuple[str, ...]:
        """Return the predictors of all signals: the feedback model and critics that fit more than watch time."""
        return ("model",) * self.use_feedback_model + ("agents",) * registry.get(self.method).has_feedback_heads


def agent_config(config: configs.Run, signals: Signals) -> AgentConfig:
    """Return the agents' config of a run whose log has these signals.

    Raises:
      ValueError: if the config names others.
    """
    agents = dataclasses.replace(config.agents, slate=config.sizes.slate, all_signals=signals)
    agents.check_signals()
    return registry.configured(config.method, agents, config.plugins)


def plan_of(config: configs.Run, signals: Signals) -> TrainConfig:
    """Return the training settings of a run's config.

    Args:
      signals: of the run's log (`InputSpec.signals`).

    Raises:
      ValueError: if the config names others.
    """
    agents = agent_config(config, signals)
    candidates = config.sizes.candidates
    fields = {spec.name: getattr(config.feedback, spec.name) for spec in dataclasses.fields(FeedbackConfig)}
    known = {"slate": agents.slate, "exposures": _exposures(config), "all_signals": signals}
    feedback = FeedbackConfig(**fields | known)
    feedback.check_signals()
    return TrainConfig(
        method=config.method,
        agents=agents,
        feedback=feedback,
        rounds=config.alternation.rounds,
        closed_loop=config.alternation.closed_loop,
        slates=agents.simulated_slates(candidates),
        others=_others(config, agents, candidates) if registry.get(config.method).uses_model else None,
    )


def _exposures(config: configs.Run) -> int:
    """Return the number of exposure types in a run's logs.

    Logs that say of each request that it is not random have one: what a model predicts for the other was never fitted.
    """
    if config.source == "world":
        return 2 if config.collect.random_share else 1
    return 2 if getattr(config.data, "random_log", "off") == "train" else 1


def _others(config: configs.Run, agents: AgentConfig, candidates: int) -> int | None:
    """Return `TrainConfig.others`: at least the number of videos in the counterfactual slates.

    None if less than a quarter of the candidates would be dropped (which saves nothing), or if unseen videos are
    sampled by a score, which all candidates must have.
    """
    wanted = config.train.candidates
    if not wanted or 4 * (wanted + agents.slate) > 3 * candidates or agents.sampling != "uniform":
        return None
    return max(wanted, agents.simulated_slates(candidates) * agents.slate)


def init_train_state(
    key: types.Key,
    plan: TrainConfig,
    spec: InputSpec,
    items: types.Items,
    feedback_mean: chex.Array,
    feedback_std: chex.Array,
    mean_return: chex.Array,
) -> TrainState:
    """Initialise a state; `Partitioner.partition_init` compiles it.

    Args:
      feedback_mean: [S] of the exposures in the first log.
      feedback_std: [S] of the exposures in the first log.
      mean_return: see `agents.mmrf.agent_state.init_agent_state`.
    """
    critic = registry.get(plan.method).critic
    agents = agent_state.init_agent_state(
        key, plan.agents, spec, items, feedback_mean, feedback_std, critic, mean_return
    )
    feedback = None
    if plan.use_feedback_model:
        key = jax.random.fold_in(key, 1)
        feedback = network.init_feedback_state(key, plan.feedback, spec, items, feedback_mean, feedback_std)
    zero = jnp.zeros((), jnp.int32)
    behavior_params = train_state.behavior_params_of(agents) if plan.closed_loop else None
    return TrainState(agents, feedback, behavior_params, zero, zero, jnp.zeros((2,), jnp.int32))


def lr_scale_at(progress: float) -> float:
    """Return the learning-rate factor at a fraction of training: a cosine from 1 to `_LAST_LR_SCALE`."""
    return _LAST_LR_SCALE + (1.0 - _LAST_LR_SCALE) * 0.5 * (1.0 + math.cos(math.pi * progress))


@programs.program(calls="many", static_argnames="plan", donate_argnums=0)
def fit_step(
    state: TrainState, batch: types.SessionBatch, items: types.Items, plan: TrainConfig, lr_scale: chex.Numeric
):
    """Take one step of the feedback model's regression on the round's log; return the next state and metrics."""
    model = train_state.model_of(state)
    if plan.feedback.debias is not None and plan.others is not None:
        key = jax.random.fold_in(jax.random.fold_in(model.key, 2), model.step)
        batch = with_fewer_candidates(batch, key, plan.others)
    feedback, metrics = fitting.update(model, batch, items, plan.feedback, lr_scale)
    return dataclasses.replace(state, feedback=feedback, done=state.done + 1), metrics


def precomputes_item_embeddings(plan: TrainConfig, items: types.Items) -> bool:
    """Return whether `precompute_item_embeddings` computes any embeddings."""
    return plan.use_feedback_model and items.statistics is None and items.num_videos < embeddings.SPLIT_ROWS


def precompute_item_embeddings(state: TrainState, items: types.Items, plan: TrainConfig) -> chex.Array | None:
    """Encode all videos with the fitted feedback model [2, V, D], once for all updates of a round.

    Returns None without a model, if features change by day, or for 2^20 videos and more, whose embeddings would take
    gigabytes; the updates then encode their candidates.
    """
    if not precomputes_item_embeddings(plan, items):
        return None
    return network.encode_items(train_state.model_of(state), items, plan.feedback)


@programs.program(calls="many", static_argnames="plan", donate_argnums=0)
def update_step(
    state: TrainState,
    batch: types.SessionBatch,
    items: types.Items,
    plan: TrainConfig,
    lr_scale: chex.Numeric,
    encodings: chex.Array | None = None,
):
    """Update the agents once; return the next state and metrics.

    Trains on impressions, on counterfactual slates labelled here, and on the model's predictions for the candidates.

    Args:
      encodings: `precompute_item_embeddings` of the state; None to encode the batch's candidates here.
    """
    method = registry.get(plan.method)
    if plan.others is not None:
        key = jax.random.fold_in(jax.random.fold_in(state.agents.key, 1), state.agents.step)
        batch = with_fewer_candidates(batch, key, plan.others)
    simulated = None
    if plan.use_feedback_model:
        model = train_state.model_of(state)
        key = jax.random.fold_in(jax.random.fold_in(model.key, 1), state.agents.step)
        ns = plan.agents.ablation == "constant_negative"
        simulated = counterfactuals.simulate_counterfactual_slates(
            model,
            batch,
            items,
            plan.feedback,
            key,
            plan.slates,
            plan.agents.rewards_differ and not ns,
            candidate_sampling_logits(state, batch, items, plan, key),
            encodings,
        )
    agents, metrics = method.update(state.agents, batch, items, plan.agents, lr_scale, simulated)
    return dataclasses.replace(state, agents=agents, done=state.done + 1), metrics


def with_fewer_candidates(batch: types.SessionBatch, key: types.Key, others: int) -> types.SessionBatch:
    """Subsample the candidates to K + others per request: those shown, in order, and others at random.

    The weights keep the totals: a shown video counts once, and the others stand for all videos that were not shown.
    """
    c, k = batch.candidates.shape[-1], batch.slate.shape[-1]
    shown = (batch.slate[..., None] == jnp.arange(c)) & batch.slate_mask[..., None]  # [B, T+1, K, C]
    place = jnp.sum(shown * jnp.arange(k + 1.0, 1.0, -1.0)[:, None], axis=-2)  # > 1 for shown videos, falling by slot
    chosen = ops.top_k(jnp.where(place > 0, place, random.uniforms(key, place.shape)), k + others)
    shown_there = jnp.take_along_axis(place > 0, chosen, axis=-1)
    number = shown_there.sum(axis=-1, keepdims=True)
    return dataclasses.replace(
        batch,
        weight=jnp.where(shown_there, 1.0, (c - number) / (k + others - number)),
        candidates=jnp.take_along_axis(batch.candidates, chosen, axis=-1),
        slate=jnp.where(batch.slate_mask, jnp.cumsum(batch.slate_mask, axis=-1) - 1, 0),
    )


def candidate_sampling_logits(
    state: TrainState, batch: types.SessionBatch, items: types.Items, plan: TrainConfig, key: types.Key
) -> chex.Array | None:
    """Return sampling logits of unseen candidates [B, T+1, C], standardised per request; None for uniform sampling."""
    if plan.agents.sampling == "uniform":
        return None
    if plan.agents.sampling == "score":
        value = registry.score_candidates(state.agents, batch, items, plan.agents, plan.method)[..., -1, :]
    else:
        key = jax.random.fold_in(key, 1)
        u = counterfactuals.uncertainty(train_state.model_of(state), batch, batch.candidates, items, plan.feedback, key)
        value = u[..., plan.agents.all_signals.index(plan.agents.agent_signals[-1])]
    return ops.standardised(value)
