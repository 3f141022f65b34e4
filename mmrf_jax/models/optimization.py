"""One gradient step on Flax parameters, by optax, and embedding tables, by `models.rowwise`, together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import optax
from flax import struct

from mmrf_jax.models import embedding_table, embeddings, rowwise
from mmrf_jax.models.encoder_config import EncoderConfig


def make_optimizer(config: EncoderConfig, actor_learning_rate: float | None = None) -> optax.GradientTransformation:
    """Return Adam with decoupled weight decay and the gradient clipped to norm 1; plain SGD for tests of invariance.

    Args:
      actor_learning_rate: of parameters {"encoder", "critic", "actor"}: Adam's learning rate for the actor, whose
        gradient is then clipped separately. None if all parameters are optimised together.
    """
    if config.optimizer == "sgd":
        return optax.sgd(config.learning_rate)
    together = _adam(config.learning_rate, config.weight_decay)
    if actor_learning_rate is None:
        return together
    labels = {"encoder": "critic", "critic": "critic", "actor": "actor"}
    return optax.multi_transform({"critic": together, "actor": _adam(actor_learning_rate, config.weight_decay)}, labels)


def _adam(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=weight_decay))


@struct.dataclass
class Learnable:
    """The state that a gradient step replaces."""

    params: Any
    optimizer: Any  # optimiser state of `params`
    tables: dict[str, embedding_table.Table]


def step(
    learnable: Learnable,
    ids: dict[str, chex.Array],
    loss_fn: Callable[[Any, dict[str, chex.Array]], tuple[chex.Array, Any]],
    config: EncoderConfig,
    optimizer: optax.GradientTransformation,
    lr_scale: chex.Numeric = 1.0,
) -> tuple[Learnable, Any, chex.Array]:
    """Take one gradient step on parameters and tables.

    Args:
      ids: rows of each table that the batch looks up, [...] int32.
      loss_fn: (params, looked-up rows {table: [..., d]}) -> the loss, and extra outputs.
      lr_scale: factor on the step of the parameters, from a schedule.

    Returns:
      The updated learnables, the extra outputs, and the norm of the gradient.
    """
    rows = embeddings.lookup(learnable.tables, ids)
    (grads, row_grads), extra = jax.grad(loss_fn, (0, 1), has_aux=True)(learnable.params, rows)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its integer count
        updates, opt_state = optimizer.update(grads, learnable.optimizer, learnable.params)
    params = optax.apply_updates(learnable.params, jax.tree.map(lambda u: lr_scale * u, updates))
    tables = {
        name: rowwise.row_update(
            t, ids[name].reshape(-1), row_grads[name].reshape(-1, t.dim), config.table_learning_rate
        )
        for name, t in learnable.tables.items()
    }
    return Learnable(params, opt_state, tables), extra, optax.tree.norm(grads)
