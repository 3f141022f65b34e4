"""The state of the agents, with its initialisation and step: parameters, target networks, tables and optimisers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from mmrf_jax import types
from mmrf_jax.agents.mmrf import encoding, losses, networks
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.models import embedding_table, embeddings, encoders, heads, optimization, representation, user_encoders
from mmrf_jax.models.optimization import make_optimizer


@struct.dataclass
class AgentState:
    """The full state of learning; all of it is checkpointed."""

    step: chex.Array  # int32, updates so far
    params: Any  # {"encoder", "critic", "actor"}
    target: Any  # Polyak average of params["critic"]
    optimizer: Any
    tables: dict[str, embedding_table.Table]  # embedding tables, outside the Flax params
    reward_scale: chex.Array  # [S] standard deviation of each signal in the first log
    q_mean: chex.Array  # [N] running mean of each critic over candidates
    q_scale: chex.Array  # [N] running spread of each critic over candidates
    key: chex.Array  # typed key


class Update(Protocol):
    """One gradient step of a method; jit it with `config` static and `state` donated."""

    def __call__(
        self,
        state: AgentState,
        batch: types.SessionBatch,
        items: types.Items,
        config: AgentConfig,
        lr_scale: chex.Numeric = 1.0,
        simulated: types.CounterfactualSlates | None = None,
    ) -> tuple[AgentState, dict[str, chex.Array]]:
        """Return the next state and scalar metrics.

        Args:
          batch: segments of T + 1 requests; the first T are learned from.
          lr_scale: factor on the learning rates.
          simulated: counterfactual slates; methods without a feedback model ignore them.
        """
        ...


def init_agent_state(
    key: types.Key,
    config: AgentConfig,
    spec: InputSpec,
    items: types.Items,
    feedback_mean: chex.Array,
    feedback_std: chex.Array,
    critic: Callable[[AgentConfig], nn.Module] = networks.Critic,
    mean_return: chex.Array | None = None,
) -> AgentState:
    """Initialise the state; jit it with `out_shardings` so that it is initialised with its final sharding.

    Args:
      feedback_mean: [S] of the exposures in the first log; the critics start from it.
      feedback_std: [S] of the same exposures; rewards are divided by it.
      critic: module used as the critics; its heads have a `prior`, like `models.heads.FeedbackHeads`.
      mean_return: [S] discounted feedback from a request of that log to its session's end, the initial values; None for
        0. Bootstrapping from 0 would take hundreds of updates to get there.
    """
    k_params, k_tables, k_state = jax.random.split(key, 3)
    k1, k2, k3 = jax.random.split(k_params, 3)
    z_size, dim = encoders.sizes(config, spec)
    z = jnp.zeros((1, z_size), jnp.float32)
    reads = user_encoders.of(config).init((1,), dim).mean()
    e = jnp.zeros((1, spec.slate, dim), jnp.float32)
    scores: tuple[chex.Array, ...] = ()
    if config.own_critics:
        z, reads, e = (jnp.stack([x] * config.num_agents, axis=1) for x in (z, reads, e))
        scores = (e[:, 1:, :, 0],) if config.collaborates else ()
    params = {
        "encoder": encoding.init_encoders(k1, config, spec),
        "critic": critic(config).init(k2, z, reads, e, *scores),
        "actor": networks.Actor(config).init(k3, z, reads, e),
    }
    prior = heads.prior(config.all_signals, feedback_mean, feedback_std)
    learned = params["critic"]["params"]
    if config.own_critics:
        learned = learned["agents"]["each"]
        prior = jnp.broadcast_to(prior, (config.num_agents, len(prior)))
    learned["heads"]["prior"] = prior[..., None].astype(jnp.float32)
    reward_scale = jnp.maximum(jnp.asarray(feedback_std, jnp.float32), 1e-3)
    if mean_return is not None and "values" in learned:
        value = losses.rewards(mean_return, reward_scale, config.reward_terms)
        slate_bias = value - spec.slate * losses.rewards(feedback_mean, reward_scale, config.reward_terms)
        bias = learned["values"]["bias"]  # twin biases of slates, then twin values; of own critics a row per agent
        start = jnp.stack([slate_bias, slate_bias, value, value], axis=-1 if config.own_critics else 0)
        learned["values"]["bias"] = start.reshape(bias.shape).astype(bias.dtype)
    return AgentState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        target=jax.tree.map(jnp.copy, params["critic"]),
        optimizer=make_optimizer(config, config.actor_learning_rate).init(params),
        tables=embeddings.init_tables(k_tables, config, spec, items, encoding.num_encoders(config)),
        reward_scale=reward_scale,
        q_mean=jnp.zeros((config.num_agents,), jnp.float32),
        q_scale=jnp.ones((config.num_agents,), jnp.float32),
        key=k_state,
    )


def step(
    state: AgentState,
    inputs: representation.EncoderInputs,
    loss_fn: Callable[[Any, representation.Encoded], tuple[chex.Array, Any]],
    config: AgentConfig,
    lr_scale: chex.Numeric = 1.0,
) -> tuple[AgentState, Any, chex.Array]:
    """Encode a batch and take one gradient step: parameters, target, optimiser and tables are replaced.

    Args:
      loss_fn: (params, the encoded batch) -> the loss, and extra outputs.
      lr_scale: factor on the step of the parameters, from a schedule.

    Returns:
      The next state, the extra outputs, and the norm of the gradient.
    """
    key = jax.random.fold_in(state.key, state.step)

    def of_rows(params, rows):
        return loss_fn(params, encoding.encode(config, params["encoder"], rows, inputs, key))

    learnable = optimization.Learnable(state.params, state.optimizer, state.tables)
    optimizer = make_optimizer(config, config.actor_learning_rate)
    learned, extra, norm = optimization.step(learnable, inputs.ids, of_rows, config, optimizer, lr_scale)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=learned.params,
        target=optax.incremental_update(learned.params["critic"], state.target, config.polyak),
        optimizer=learned.optimizer,
        tables=learned.tables,
    )
    return state, extra, norm
