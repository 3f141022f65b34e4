"""Embedding tables, kept outside the Flax parameters so that no gradient of the size of a table is ever made.

The training step looks rows up, differentiates with respect to the rows (not the table), and hands the row gradients
to `rowwise.row_update`:

    rows = lookup(table, ids)                                       # [..., D]
    grads = jax.grad(loss, argnums=1)(params, rows)                 # [..., D]
    table = row_update(table, ids.reshape(-1), grads.reshape(-1, dim), learning_rate, eps)
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import struct

from mmrf_jax.types import Key


@struct.dataclass
class Table:
    """V rows and the state of their optimiser."""

    rows: chex.Array  # [V, D] float32
    accumulator: chex.Array  # [V] float32, initial value plus the sum of the mean squared gradients of the row

    @property
    def num_rows(self) -> int:
        """V; also the id that stands for "no row"."""
        return self.rows.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.rows.shape[1]


def init(key: Key, num_rows: int, dim: int, scale: float, initial_accumulator: float = 0.1) -> Table:
    """A table of normal rows.

    Args:
      key: typed key.
      num_rows: V, at least 1 and below 2^31 − 1.
      dim: D, at least 1.
      scale: standard deviation of the entries.
      initial_accumulator: first value of every accumulator, at least 0; the larger, the smaller the first steps.

    Raises:
      ValueError: for sizes or an initial accumulator out of range.
    """
    if not 1 <= num_rows < 2**31 - 1 or dim < 1:
        raise ValueError(f"a table of {num_rows} rows of {dim} entries; rows must be in [1, 2^31 − 1) and entries ≥ 1")
    if initial_accumulator < 0:
        raise ValueError(f"initial_accumulator is {initial_accumulator}; it must be at least 0 (usual: 0.1)")
    rows = scale * jax.random.normal(key, (num_rows, dim), jnp.float32)
    return Table(rows=rows, accumulator=jnp.full((num_rows,), initial_accumulator, jnp.float32))


def lookup(table: Table, ids: jax.Array) -> jax.Array:
    """Rows of the ids; zeros for an id out of [0, V), so that V can stand for "no row".

    Args:
      table: V rows.
      ids: [...] int32.

    Returns:
      [..., D] float32.
    """
    chex.assert_type(ids, int)
    ids = jnp.where(ids < 0, table.num_rows, ids)  # a negative id would count from the end
    return table.rows.at[ids].get(mode="fill", fill_value=0)
