"""The state of a run and the steps of its rounds: fit the feedback model, label, update (MMRF, Algorithm 1)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from mmrf_jax import ops, random, types
from mmrf_jax.agents import registry
from mmrf_jax.agents.mmrf import agent_state
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.checkpointing import leaves
from mmrf_jax.data.schema import Schema
from mmrf_jax.models import embedding_table, embeddings
from mmrf_jax.models.feedback_model import counterfactuals, fitting, network
from mmrf_jax.models.feedback_model.network import FeedbackConfig, FeedbackState
from mmrf_jax.parallel import programs, sharding
from mmrf_jax.training import configs

_LAST_RATE = 0.05  # where the cosine of the learning rates ends


@struct.dataclass
class TrainState:
    """Everything that a run must know to go on; all of it is checkpointed."""

    agents: agent_state.AgentState
    feedback: FeedbackState | None  # None where no feedback model is fitted
    behavior_params: (
        Any  # {"params", "tables"} of the agents that collected this round's log; None where logs are given
    )
    round: chex.Array  # int32, from 0; the number of rounds once all are over
    done: chex.Array  # int32, steps of this round so far: those of the fit, then updates
    logged: chex.Array  # [2] int32, sessions and requests of the newest log


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What a run alternates between; hashable.

    Attributes:
      method: name in `methods.METHODS`. rounds: fit → label → update, so many times.
      closed_loop: whether each round after the first has a log of its own: the newest policy's, or another of the first
        policy where the method does not collect its own (`methods.Method.collects`).
      slates: of unseen videos labelled by the feedback model at each request.
      others: candidates of each request that an update looks at beside those shown; None for all.
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
        """Whether a feedback model is fitted, for labels or for values."""
        return self.slates > 0 or self.agents.uses_model

    @property
    def predictors(self) -> tuple[str, ...]:
        """Who predicts every signal: the feedback model, and the critics of agents; others fit watch time alone."""
        return ("model",) * self.use_feedback_model + ("agents",) * registry.get(self.method).predicts


def agent_config(config: configs.Run) -> AgentConfig:
    """The agents of a run's config."""
    slate = config.sizes.slate
    return registry.configured(config.method, dataclasses.replace(config.agents, slate=slate))


def plan_of(config: configs.Run) -> TrainConfig:
    """What a run's config alternates between."""
    agents = agent_config(config)
    candidates = config.sizes.candidates
    fields = {spec.name: getattr(config.feedback, spec.name) for spec in dataclasses.fields(FeedbackConfig)}
    return TrainConfig(
        method=config.method,
        agents=agents,
        feedback=FeedbackConfig(**fields | {"slate": agents.slate, "exposures": _exposures(config)}),
        rounds=config.alternation.rounds,
        closed_loop=config.alternation.closed_loop,
        slates=agents.simulated_slates(candidates),
        others=_others(config, agents, candidates) if registry.get(config.method).simulates else None,
    )


def _exposures(config: configs.Run) -> int:
    """Kinds of exposure that a run's logs tell apart."""
    return 2 if config.source == "kuairand" and config.kuairand.random_log == "train" else 1


def _others(config: configs.Run, agents: AgentConfig, candidates: int) -> int | None:
    """`TrainConfig.others`: at least the videos of the simulated slates.

    None where less than a quarter of the candidates would be left out, which saves nothing, and where unseen videos are
    drawn by a score, which all candidates must have.
    """
    wanted = config.train.candidates
    if not wanted or 4 * (wanted + agents.slate) > 3 * candidates or agents.sampling != "uniform":
        return None
    return max(wanted, agents.simulated_slates(candidates) * agents.slate)


def init(
    key: types.Key,
    plan: TrainConfig,
    schema: Schema,
    items: types.Items,
    feedback_mean: chex.Array,
    feedback_std: chex.Array,
    mean_return: chex.Array,
) -> TrainState:
    """A fresh state; jit it with `out_shardings` so that it is born where it lives.

    Args:
      feedback_mean, feedback_std: [S] of the exposures in the first log.
      mean_return: see `agents.mmrf.agent_state.init`.
    """
    critic = registry.get(plan.method).critic
    agents = agent_state.init(key, plan.agents, schema, items, feedback_mean, feedback_std, critic, mean_return)
    feedback = None
    if plan.use_feedback_model:
        key = jax.random.fold_in(key, 1)
        feedback = network.init(key, plan.feedback, schema, items, feedback_mean, feedback_std)
    zero = jnp.zeros((), jnp.int32)
    server = _server(agents) if plan.closed_loop else None
    return TrainState(agents, feedback, server, zero, zero, jnp.zeros((2,), jnp.int32))


def infer_shardings(state: TrainState, mesh) -> TrainState:
    """The state's shapes with where each array lives: large embedding tables split by rows, all else on every device.

    A step's lookups and updates of a split table cost one sum over the devices of what the batch looks up; nothing of
    the size of the table moves (`tests/parallel/test_split_tables.py`).
    """

    def place(x: Any):
        split = isinstance(x, embedding_table.Table) and embeddings.is_split(x, mesh.size)
        return leaves.targets(x, sharding.sharded(mesh) if split else sharding.replicated(mesh))

    return jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, embedding_table.Table))


def _server(agents: agent_state.AgentState):
    return jax.tree.map(jnp.copy, {"params": agents.params, "tables": agents.tables})


def model_of(state: TrainState) -> FeedbackState:
    """The feedback model of a run that fits one (`TrainConfig.use_feedback_model`)."""
    assert state.feedback is not None
    return state.feedback


@functools.partial(jax.jit, donate_argnums=0)
def next_round(state: TrainState) -> TrainState:
    """The next round's beginning: what was learned so far serves."""
    server = None if state.behavior_params is None else _server(state.agents)
    return dataclasses.replace(state, behavior_params=server, round=state.round + 1, done=jnp.zeros_like(state.done))


def behavior_state(state: TrainState) -> agent_state.AgentState:
    """The agents as they were when this round began."""
    return dataclasses.replace(
        state.agents, params=state.behavior_params["params"], tables=state.behavior_params["tables"]
    )


def rate(progress: float) -> float:
    """Factor on the learning rates at a share of the way: a cosine from 1 to `_LAST_RATE`."""
    return _LAST_RATE + (1.0 - _LAST_RATE) * 0.5 * (1.0 + math.cos(math.pi * progress))


@programs.program(often=True, static_argnames="plan", donate_argnums=0)
def fit_step(state: TrainState, batch: types.SessionBatch, items: types.Items, plan: TrainConfig, rate: chex.Numeric):
    """One step of the feedback model's regression on the round's log: the next state, and metrics."""
    feedback, metrics = fitting.update(model_of(state), batch, items, plan.feedback, rate)
    return dataclasses.replace(state, feedback=feedback, done=state.done + 1), metrics


def precomputes_item_embeddings(plan: TrainConfig, items: types.Items) -> bool:
    """Whether `precompute_item_embeddings` gives any."""
    return plan.use_feedback_model and items.statistics is None and items.num_videos < embeddings.SPLIT_ROWS


def precompute_item_embeddings(state: TrainState, items: types.Items, plan: TrainConfig) -> chex.Array | None:
    """Encodings [2, V, D] of all videos by the fitted feedback model, made once for the updates of a round.

    None without a model, where features change from day to day, and for catalogues of 2^20 videos and more, of which
    they would take gigabytes: the updates then encode their candidates.
    """
    if not precomputes_item_embeddings(plan, items):
        return None
    return _encode_catalogue(model_of(state), items, plan.feedback)


_encode_catalogue = jax.jit(network.encode_catalogue, static_argnames="config")


@programs.program(often=True, static_argnames="plan", donate_argnums=0)
def update_step(
    state: TrainState,
    batch: types.SessionBatch,
    items: types.Items,
    plan: TrainConfig,
    rate: chex.Numeric,
    encodings: chex.Array | None = None,
):
    """One update of the agents on impressions, slates of unseen videos labelled here, and the model's view of the pool:
    next state, metrics.

    Args:
      encodings: `precompute_item_embeddings` of the state; None to make those of the batch's candidates here.
    """
    method = registry.get(plan.method)
    if plan.others is not None:
        key = jax.random.fold_in(jax.random.fold_in(state.agents.key, 1), state.agents.step)
        batch = with_fewer_candidates(batch, key, plan.others)
    if plan.use_feedback_model:
        model = model_of(state)
        key = jax.random.fold_in(jax.random.fold_in(model.key, 1), state.agents.step)
        ns = plan.agents.ablation == "constant_negative"
        simulated = counterfactuals.answer(
            model,
            batch,
            items,
            plan.feedback,
            key,
            plan.slates,
            plan.agents.rewards_differ and not ns,
            preference(state, batch, items, plan, key),
            encodings,
        )
        agents, metrics = method.update(state.agents, batch, items, plan.agents, rate, simulated)
    else:
        agents, metrics = method.update(state.agents, batch, items, plan.agents, rate)
    return dataclasses.replace(state, agents=agents, done=state.done + 1), metrics


def with_fewer_candidates(batch: types.SessionBatch, key: types.Key, others: int) -> types.SessionBatch:
    """The batch with K + others candidates of each request: those shown, in order, and others drawn at random.

    Those shown stand for themselves, the others together for all that were not shown.
    """
    c, k = batch.candidates.shape[-1], batch.slate.shape[-1]
    shown = (batch.slate[..., None] == jnp.arange(c)) & batch.slate_mask[..., None]  # [B, T+1, K, C]
    place = jnp.sum(shown * jnp.arange(k + 1.0, 1.0, -1.0)[:, None], axis=-2)  # above 1 for those shown, falling
    chosen = ops.top_k(jnp.where(place > 0, place, random.uniforms(key, place.shape)), k + others)
    shown_there = jnp.take_along_axis(place > 0, chosen, axis=-1)
    number = shown_there.sum(axis=-1, keepdims=True)
    return dataclasses.replace(
        batch,
        weight=jnp.where(shown_there, 1.0, (c - number) / (k + others - number)),
        candidates=jnp.take_along_axis(batch.candidates, chosen, axis=-1),
        slate=jnp.where(batch.slate_mask, jnp.cumsum(batch.slate_mask, axis=-1) - 1, 0),
    )


def preference(
    state: TrainState, batch: types.SessionBatch, items: types.Items, plan: TrainConfig, key: types.Key
) -> chex.Array | None:
    """By what unseen candidates are drawn [B, T+1, C], standardised within the request; None for all alike."""
    if plan.agents.sampling == "uniform":
        return None
    if plan.agents.sampling == "score":
        value = registry.score_candidates(state.agents, batch, items, plan.agents, plan.method)[..., -1, :]
    else:
        key = jax.random.fold_in(key, 1)
        u = counterfactuals.uncertainty(model_of(state), batch, batch.candidates, items, plan.feedback, key)
        value = u[..., types.signal_index(plan.agents.signals[-1])]
    return ops.standardised(value)
