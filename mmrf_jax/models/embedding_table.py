"""Embedding tables, outside the Flax parameters so that no gradient has the size of a table.

The training step looks rows up, differentiates with respect to the rows (not the table), and passes the row gradients
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

MANY_ROWS = 2**20  # from which a table is initialised in one fused loop
DTYPES = ("float32", "bfloat16")


@struct.dataclass
class Table:
    """V rows and their optimiser state."""

    rows: chex.Array  # [V, D] float32 or bfloat16
    accumulator: chex.Array  # [V] float32, initial value plus the sum of the mean squared gradients of the row
    vocabulary: int = struct.field(pytree_node=False, default=0)  # number of ids; if above V, ids share rows

    @property
    def num_rows(self) -> int:
        """V; also the id that means "no row"."""
        return self.rows.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.rows.shape[1]


def init_table(
    key: Key,
    num_rows: int,
    dim: int,
    scale: float,
    initial_accumulator: float = 0.1,
    vocabulary: int = 0,
    dtype: str = "float32",
) -> Table:
    """Initialise a table with normal rows.

    Args:
      key: typed key.
      num_rows: V, at least 1 and below 2^31 − 1.
      dim: D, at least 1.
      scale: standard deviation of the entries.
      initial_accumulator: initial value of every accumulator, at least 0; larger values make the first steps smaller.
      vocabulary: number of ids; if it is more than V, ids share rows by the hash of `row_of`.
      dtype: of the rows, `float32` or, for half the memory, `bfloat16`.

    Raises:
      ValueError: if a size, the initial accumulator or the dtype is out of range.
    """
    if not 1 <= num_rows < 2**31 - 1 or dim < 1:
        raise ValueError(f"a table of {num_rows} rows of {dim} entries; rows must be in [1, 2^31 − 1) and entries ≥ 1")
    if initial_accumulator < 0:
        raise ValueError(f"initial_accumulator is {initial_accumulator}; it must be at least 0 (usual: 0.1)")
    if dtype not in DTYPES:
        raise ValueError(f"rows of dtype {dtype!r}; use {' or '.join(DTYPES)}")
    draw = jax.random.normal if num_rows < MANY_ROWS else _normal_at_once
    rows = (scale * draw(key, (num_rows, dim), jnp.float32)).astype(dtype)
    return Table(rows, jnp.full((num_rows,), initial_accumulator, jnp.float32), vocabulary)


def mix(x: jax.Array) -> jax.Array:
    """Hash uint32 numbers, with 0 -> 0 (the finalizer of MurmurHash3)."""
    x = x.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _normal_at_once(key: Key, shape: tuple[int, int], dtype) -> jax.Array:
    """Draw normal numbers from a hash of row and column: one fused loop, on each device for its rows.

    `jax.random.normal` for as many rows takes three times their memory in addition.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    row = jax.lax.broadcasted_iota(jnp.uint32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.uint32, shape, 1)
    bits = mix(mix(row + first) + jnp.uint32(0x9E3779B9) * (column + second))
    u = ((bits >> 8).astype(dtype) + 0.5) * 2.0**-24
    return jnp.sqrt(2.0).astype(dtype) * jax.lax.erf_inv(2.0 * u - 1.0)


def row_of(table: Table, ids: jax.Array) -> jax.Array:
    """Return the rows [...] int32 of ids [...] int32: V, "no row", for an invalid id."""
    limit = max(table.num_rows, table.vocabulary)
    none = (ids < 0) | (ids >= limit)  # a negative id would count from the end
    if table.vocabulary > table.num_rows:
        ids = (mix(ids) % jnp.uint32(table.num_rows)).astype(jnp.int32)
    return jnp.where(none, table.num_rows, ids)


def lookup(table: Table, ids: jax.Array) -> jax.Array:
    """Look up the rows of ids; zeros for an id out of [0, V), or of the vocabulary if that is larger: "no row".

    Args:
      table: V rows.
      ids: [...] int32.

    Returns:
      [..., D] float32.
    """
    chex.assert_type(ids, int)
    return table.rows.at[row_of(table, ids)].get(mode="fill", fill_value=0).astype(jnp.float32)
