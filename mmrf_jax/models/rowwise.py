"""Row-wise Adagrad: one accumulator per row; the work is proportional to the ids of the batch, not to the table."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp

from mmrf_jax.models.embedding_table import Table, mix, row_of


def sum_duplicates(ids: jax.Array, grads: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Sum the gradients of equal ids, at a fixed shape.

    Args:
      ids: [M] int32; out of [0, num_rows) means "ignore".
      grads: [M, D] float.
      num_rows: V.

    Returns:
      unique: [M] int32, the distinct ids in ascending order, then num_rows, num_rows + 1, ... in the unused slots (all
        distinct and out of range, so that a scatter drops them).
      sums: [M, D] float32, the gradient of each, meaningless in the unused slots.

    Raises:
      ValueError: if num_rows + M does not fit in int32.
    """
    size = ids.shape[0]
    if num_rows + size >= 2**31:
        raise ValueError(f"{num_rows} rows and {size} ids do not fit in int32 together; use a smaller table")
    ids = jnp.where((ids < 0) | (ids >= num_rows), num_rows, ids)
    order = jnp.argsort(ids, stable=True)
    ordered = ids[order]
    first = jnp.concatenate([jnp.ones((1,), bool), ordered[1:] != ordered[:-1]])
    segment = jnp.cumsum(first) - 1  # [M] index of the distinct id
    sums = jax.ops.segment_sum(
        grads[order].astype(jnp.float32), segment, num_segments=size, indices_are_sorted=True, mode="drop"
    )
    slots = num_rows + jnp.arange(size, dtype=ids.dtype)
    unique = slots.at[segment].set(jnp.where(ordered < num_rows, ordered, slots[segment]), indices_are_sorted=True)
    return unique, sums


def row_update(table: Table, ids: jax.Array, grads: jax.Array, learning_rate: chex.Numeric, eps: float = 1e-8) -> Table:
    """Take one step of row-wise Adagrad on the rows of `ids`; every other row is unchanged bit for bit.

    For each distinct id, with g the sum of its gradients: accumulator += mean(g²), then
    row −= learning_rate · g / (sqrt(accumulator) + eps). Call it under jit with the table donated; an update that is
    not in place copies the table. The result does not depend on the order of the ids, up to float rounding.

    Args:
      table: V rows of D.
      ids: [M] int32; an id without a row (`embedding_table.row_of`) is ignored.
      grads: [M, D], the gradient of the loss with respect to the looked-up rows.
      learning_rate: scalar.
      eps: added to the root; positive.

    Returns:
      The updated table.
    """
    chex.assert_rank(ids, 1)
    chex.assert_type(ids, int)
    chex.assert_shape(grads, (ids.shape[0], table.dim))
    if ids.shape[0] == 0:
        return table
    unique, sums = sum_duplicates(row_of(table, ids), grads, table.num_rows)
    scatter = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}
    # Read, then write: reads of distant rows overlap in memory, a scatter's additions wait for each other.
    total = table.accumulator.at[unique].get(mode="fill", fill_value=1.0) + jnp.mean(jnp.square(sums), axis=-1)  # [M]
    accumulator = table.accumulator.at[unique].set(total, **scatter)
    step = learning_rate * sums / (jnp.sqrt(total) + eps)[:, None]
    if table.rows.dtype == jnp.float32:
        return dataclasses.replace(table, rows=table.rows.at[unique].add(-step, **scatter), accumulator=accumulator)
    rows = table.rows.at[unique].get(mode="fill", fill_value=0).astype(jnp.float32) - step
    rows = round_at_random(rows, accumulator.at[unique].get(mode="fill", fill_value=1.0))
    return dataclasses.replace(table, rows=table.rows.at[unique].set(rows, **scatter), accumulator=accumulator)


def round_at_random(x: jax.Array, salt: jax.Array) -> jax.Array:
    """Round x [M, D] float32 to bfloat16, up or down with probabilities that make it unbiased.

    Rounding to nearest would lose all steps below 1/512 of an entry. The random bits are a hash of the row's salt [M]
    float32, such as its accumulator, which every step changes: they are the same on any number of devices.
    """

    def bits(y):
        return jax.lax.bitcast_convert_type(y, jnp.uint32)

    noise = mix(mix(bits(salt))[:, None] + jnp.arange(1, x.shape[1] + 1, dtype=jnp.uint32))
    kept = (bits(x) + (noise & jnp.uint32(0xFFFF))) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(kept, jnp.float32).astype(jnp.bfloat16)
