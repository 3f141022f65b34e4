"""The state of learning, born and stepped: Flax parameters, target networks, embedding tables and optimisers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from mmrf_jax import types
from mmrf_jax.agents import encoder as enc
from mmrf_jax.agents import networks
from mmrf_jax.agents.config import AgentConfig
from mmrf_jax.data.schema import Schema
from mmrf_jax.embeddings import rowwise, table

VIDEO_TABLES = ("author", "id", "tag")
USER_TABLE = "user"
# Tags are few and each is seen often: telling them apart from the start spares the slow way out of a product of zeros.
# Losses are means over a batch, so a row's gradient is small: a large accumulator would freeze it.
_INITIAL_ACCUMULATOR = 1e-7
# A user without training rows has zeros: what is known of nobody in particular.
_INIT_SCALE = {"author": 0.1, "id": 0.02, "tag": 0.5, "user": 0.0}


@struct.dataclass
class AgentState:
    """Everything that learning changes; all of it is checkpointed."""

    step: chex.Array  # int32, updates so far
    params: Any  # {"encoder", "critic", "actor"}
    target: Any  # Polyak average of params["critic"]
    optimizer: Any
    tables: dict[str, table.Table]  # embedding tables, outside the Flax params
    reward_scale: chex.Array  # [S] standard deviation of each signal in the first log
    q_mean: chex.Array  # [N] running mean of each critic over candidates
    q_scale: chex.Array  # [N] running spread of each critic over candidates
    key: chex.Array  # typed key


def optimizer(config: AgentConfig) -> optax.GradientTransformation:
    """Adam with decoupled weight decay, clipped apart for actors and critics; plain SGD for invariance tests."""
    if config.optimizer == "sgd":
        return optax.sgd(config.learning_rate)

    def adam(rate):
        if config.decay_updates:
            rate = optax.cosine_decay_schedule(rate, config.decay_updates, alpha=0.05)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=config.weight_decay))

    labels = {"encoder": "critic", "critic": "critic", "actor": "actor"}
    return optax.multi_transform(
        {"critic": adam(config.learning_rate), "actor": adam(config.actor_learning_rate)}, labels
    )


def init(
    key: types.Key,
    config: AgentConfig,
    schema: Schema,
    items: types.Items,
    feedback_mean: chex.Array,
    feedback_std: chex.Array,
) -> AgentState:
    """A fresh state; jit it with `out_shardings` so that it is born where it lives.

    Args:
      feedback_mean, feedback_std: [S] of the exposures in the first log; rewards are divided by the second, and the
        critics start from the first.
    """
    k_params, k_tables, k_state = jax.random.split(key, 3)
    sizes = {
        "author": (schema.num_authors, config.author_dim),
        "id": (items.num_embeddings, config.id_dim),
        "tag": (schema.num_tags, config.tag_dim),
        "user": (max(schema.num_users, 1), config.user_dim),
    }
    tables = {
        name: table.init(jax.random.fold_in(k_tables, i), rows, dim, _INIT_SCALE[name], _INITIAL_ACCUMULATOR)
        for i, (name, (rows, dim)) in enumerate(sorted(sizes.items()))
    }
    k = schema.slate
    rows = {name: jnp.zeros((1, k, sizes[name][1])) for name in VIDEO_TABLES}
    encoder, actor, critic = enc.Encoder(config), networks.Actor(config), networks.Critic(config)
    k1, k2, k3 = jax.random.split(k_params, 3)
    encoder_params = encoder.init(
        k1, rows, jnp.zeros((1, config.user_dim)), jnp.zeros((1, k, schema.item_features)),
        jnp.zeros((1, k, len(types.SIGNALS))), jnp.ones((1, k)), jnp.zeros((1, schema.profile)),
        jnp.zeros((1, schema.context)),
    )  # fmt: skip
    z = jnp.zeros((1, config.state_dim))
    memory = jnp.zeros((1, len(config.decays), config.feedback_dim, config.dim))
    e = jnp.zeros((1, k, config.dim))
    params = {
        "encoder": encoder_params,
        "critic": critic.init(k2, z, memory, e),
        "actor": actor.init(k3, z, memory, e),
    }
    rate = jnp.clip(feedback_mean, 1e-5, None)
    prior = jnp.where(
        jnp.arange(len(rate)) == types.WATCH_TIME,
        jnp.log(rate / feedback_std),
        jnp.log(rate / (1 - jnp.minimum(rate, 0.999))),
    )
    params["critic"]["params"]["prior"] = prior[:, None].astype(jnp.float32)
    return AgentState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        target=jax.tree.map(jnp.copy, params["critic"]),
        optimizer=optimizer(config).init(params),
        tables=tables,
        reward_scale=jnp.maximum(jnp.asarray(feedback_std, jnp.float32), 1e-3),
        q_mean=jnp.zeros((config.num_agents,)),
        q_scale=jnp.ones((config.num_agents,)),
        key=k_state,
    )


def video_ids(items: types.Items, videos: chex.Array) -> dict[str, chex.Array]:
    """Rows of each table of videos for videos [...]."""
    return {"author": items.author[videos], "id": items.embedding_id[videos], "tag": items.tag[videos]}


def lookup(tables: dict[str, table.Table], ids: dict[str, chex.Array]) -> dict[str, chex.Array]:
    """Rows {table: [..., d]} of ids {table: [...]}."""
    return {name: table.lookup(tables[name], i) for name, i in ids.items()}


def encode_videos(config: AgentConfig, params, tables, items: types.Items, videos: chex.Array) -> chex.Array:
    """Encodings [..., D] of videos [...], without gradient."""
    rows = lookup(tables, video_ids(items, videos))
    e = enc.Encoder(config).apply(params["encoder"], rows, items.features[videos], method="items")
    return jax.lax.stop_gradient(e)


class Reduction:
    """Sums over the whole batch, wherever its users are.

    Args:
      axis_name: name of a mapped axis (`jax.pmap`, `jax.vmap`) over which the batch is split; None under `jit`, where
        the compiler sees the whole batch.
    """

    def __init__(self, axis_name: str | None = None):
        self._axis = axis_name

    def sum(self, tree: Any) -> Any:
        """Sums over the mapped axis, if there is one."""
        return tree if self._axis is None else jax.lax.psum(tree, self._axis)

    def gather(self, tree: Any) -> Any:
        """Leading axes of all devices, concatenated."""
        if self._axis is None:
            return tree
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self._axis, tiled=True), tree)

    def fold(self, key: types.Key) -> types.Key:
        """A key of this device."""
        return key if self._axis is None else jax.random.fold_in(key, jax.lax.axis_index(self._axis))


def step(
    state: AgentState,
    ids: dict[str, chex.Array],
    loss_fn: Callable[[Any, dict[str, chex.Array]], tuple[chex.Array, Any]],
    config: AgentConfig,
    reduction: Reduction,
) -> tuple[AgentState, Any, chex.Array]:
    """One gradient step on parameters and tables.

    Args:
      ids: rows of each table that the batch looks up, [...] int32.
      loss_fn: (params, looked-up rows {table: [..., d]}) -> this device's part of the loss, and extra outputs.

    Returns:
      The state with parameters, target, optimiser and tables replaced, the extra outputs, and the norm of the gradient.
    """
    grads, extra = jax.grad(loss_fn, (0, 1), has_aux=True)(state.params, lookup(state.tables, ids))
    grads, row_grads = reduction.sum(grads[0]), reduction.gather(grads[1])
    ids = reduction.gather(ids)
    updates, opt_state = optimizer(config).update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    rate = config.table_learning_rate
    tables = {
        name: rowwise.row_update(t, ids[name].reshape(-1), row_grads[name].reshape(-1, t.dim), rate)
        for name, t in state.tables.items()
    }
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        target=optax.incremental_update(params["critic"], state.target, config.polyak),
        optimizer=opt_state,
        tables=tables,
    )
    return state, extra, optax.tree.norm(grads)
