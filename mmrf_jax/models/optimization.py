"""One gradient step on Flax parameters and embedding tables together, for a batch that may be split over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from mmrf_jax import types
from mmrf_jax.models import embedding_table, embeddings, rowwise
from mmrf_jax.models.encoder_config import EncoderConfig


@struct.dataclass
class Learnable:
    """The state that a gradient step replaces."""

    params: Any
    optimizer: Any  # optimiser state of `params`
    tables: dict[str, embedding_table.Table]


class Reduction:
    """Reductions over the whole batch, on whatever devices its users are.

    Args:
      axis_name: name of a mapped axis (`jax.pmap`, `jax.vmap`) over which the batch is split; None under `jit`, where
        the compiler sees the whole batch.
    """

    def __init__(self, axis_name: str | None = None):
        self._axis = axis_name

    def sum(self, tree: Any) -> Any:
        """Sum over the mapped axis, if there is one."""
        return tree if self._axis is None else jax.lax.psum(tree, self._axis)

    def count(self, weight: chex.Array) -> chex.Array:
        """Return the sum of a weight over the whole batch, at least 1: what masked sums are divided by."""
        return jnp.maximum(self.sum(weight.sum()), 1.0)

    def gather(self, tree: Any) -> Any:
        """Concatenate the leading axes of all devices."""
        if self._axis is None:
            return tree
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self._axis, tiled=True), tree)

    def fold(self, key: types.Key) -> types.Key:
        """Return a key for this device."""
        return key if self._axis is None else jax.random.fold_in(key, jax.lax.axis_index(self._axis))


def step(
    learnable: Learnable,
    ids: dict[str, chex.Array],
    loss_fn: Callable[[Any, dict[str, chex.Array]], tuple[chex.Array, Any]],
    config: EncoderConfig,
    optimizer: optax.GradientTransformation,
    reduction: Reduction,
    rate: chex.Numeric = 1.0,
) -> tuple[Learnable, Any, chex.Array]:
    """Take one gradient step on parameters and tables.

    Args:
      ids: rows of each table that the batch looks up, [...] int32.
      loss_fn: (params, looked-up rows {table: [..., d]}) -> this device's part of the loss, and extra outputs.
      rate: factor on the step of the parameters, from a schedule.

    Returns:
      The updated learnables, the extra outputs, and the norm of the gradient.
    """
    rows = embeddings.lookup(learnable.tables, ids)
    grads, extra = jax.grad(loss_fn, (0, 1), has_aux=True)(learnable.params, rows)
    grads, row_grads = reduction.sum(grads[0]), reduction.gather(grads[1])
    ids = reduction.gather(ids)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its integer count
        updates, opt_state = optimizer.update(grads, learnable.optimizer, learnable.params)
    params = optax.apply_updates(learnable.params, jax.tree.map(lambda u: rate * u, updates))
    tables = {
        name: rowwise.row_update(
            t, ids[name].reshape(-1), row_grads[name].reshape(-1, t.dim), config.table_learning_rate
        )
        for name, t in learnable.tables.items()
    }
    return Learnable(params, opt_state, tables), extra, optax.tree.norm(grads)
