"""Row-wise Adagrad against a dense one in float64, and proof that its work does not grow with the table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax.models import embedding_table, rowwise

V, D, M, RATE, EPS = 50, 6, 40, 0.3, 1e-8
update = jax.jit(rowwise.row_update, donate_argnums=0)
row_update, lookup = jax.jit(rowwise.row_update), jax.jit(embedding_table.lookup)


def dense_adagrad(rows, accumulator, ids, grads):
    """The same step with a dense gradient, in NumPy float64."""
    dense = np.zeros_like(rows)
    np.add.at(dense, ids[ids < V], grads[ids < V].astype(np.float64))
    accumulator = accumulator + np.mean(dense**2, axis=1)
    return rows - RATE * dense / (np.sqrt(accumulator) + EPS)[:, None], accumulator


def batch(rng, masked=0.0):
    ids = rng.integers(0, 20, M).astype(np.int32) * 2  # even rows below 40 only: many duplicates, many untouched
    ids[rng.random(M) < masked] = V
    return ids, rng.normal(size=(M, D)).astype(np.float32)


@functools.cache
def make_one(**kwargs):
    return jax.device_get(
        jax.jit(lambda key: embedding_table.init_table(key, V, D, scale=0.1, **kwargs))(jax.random.key(0))
    )


def make(**kwargs):
    """A new one each time, for some steps donate theirs."""
    return jax.tree.map(jnp.array, make_one(**kwargs))


@pytest.mark.parametrize("masked", [0.0, 0.4, 1.0])
def test_equals_dense_adagrad_over_steps_with_duplicates(masked):
    rng = np.random.default_rng(1)
    ours = make()
    rows, accumulator = np.float64(ours.rows), np.float64(ours.accumulator)
    for _ in range(6):
        ids, grads = batch(rng, masked)
        ours = update(ours, ids, grads, RATE, EPS)
        rows, accumulator = dense_adagrad(rows, accumulator, ids, grads)
        np.testing.assert_allclose(ours.rows, rows, atol=1e-6)
        np.testing.assert_allclose(ours.accumulator, accumulator, rtol=1e-6)


def test_untouched_rows_keep_their_bits_and_touched_ones_do_not():
    before = make()
    ids, grads = batch(np.random.default_rng(2), masked=0.3)
    after = row_update(before, ids, grads, RATE, EPS)
    changed = np.any(np.asarray(before.rows) != np.asarray(after.rows), axis=1)
    np.testing.assert_array_equal(np.flatnonzero(changed), np.unique(ids[ids < V]))
    np.testing.assert_array_equal(np.asarray(before.accumulator) != np.asarray(after.accumulator), changed)


@pytest.mark.parametrize("no_row", [V, V + 7, -1])
def test_masked_ids_are_ignored_even_with_nan_gradients(no_row):
    ids, grads = batch(np.random.default_rng(3))
    padded = np.concatenate([np.full(9, no_row, np.int32), ids])
    noise = np.concatenate([np.full((9, D), np.nan, np.float32), grads])
    with_padding = row_update(make(), padded, noise, RATE, EPS)
    jax.tree.map(np.testing.assert_array_equal, with_padding, row_update(make(), ids, grads, RATE, EPS))
    np.testing.assert_array_equal(lookup(make(), jnp.array([no_row])), np.zeros((1, D)))


def test_order_of_ids_does_not_matter():
    ids, grads = batch(np.random.default_rng(4))
    order = np.random.default_rng(5).permutation(M)
    one = row_update(make(), ids, grads, RATE, EPS)
    other = row_update(make(), ids[order], grads[order], RATE, EPS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)


def test_zero_accumulator_and_zero_gradient_give_no_nan():
    start = make(initial_accumulator=0.0)
    after = row_update(start, jnp.arange(4), jnp.zeros((4, D)), RATE, EPS)
    jax.tree.map(np.testing.assert_array_equal, after, start)


def test_unique_slots_are_ascending_and_distinct():
    unique, sums = rowwise.sum_duplicates(jnp.array([7, 3, V, 7, 3, V]), jnp.ones((6, 1)), V)
    np.testing.assert_array_equal(unique[:2], [3, 7])
    assert np.all(np.diff(unique) > 0) and np.all(unique[2:] >= V)
    np.testing.assert_array_equal(sums[:2], [[2.0], [2.0]])


def step_by_rows(state, ids, target):
    """A training step as the agents take it: the gradient is of the rows looked up."""

    def loss(rows):
        return jnp.mean(jnp.square(rows - target))

    grads = jax.grad(loss)(lookup(state, ids))
    return row_update(state, ids.reshape(-1), grads.reshape(-1, state.dim), RATE, EPS)


def step_by_table(state, ids, target):
    """The bug that the house forbids: the gradient of the whole table."""

    def loss(rows):
        return jnp.mean(jnp.square(rows[ids] - target))

    return embedding_table.Table(rows=state.rows - RATE * jax.grad(loss)(state.rows), accumulator=state.accumulator)


def table_sized_operations(step, num_rows):
    """Names of the operations of the jaxpr that make an array as long as the table."""
    state = jax.eval_shape(lambda: embedding_table.init_table(jax.random.key(0), num_rows, 16, 0.1))
    ids, target = jax.ShapeDtypeStruct((8, 4), jnp.int32), jax.ShapeDtypeStruct((8, 4, 16), jnp.float32)
    names = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            inner = [equation.params[name] for name in ("jaxpr", "call_jaxpr") if name in equation.params]
            for sub in inner:
                walk(getattr(sub, "jaxpr", sub))
            if not inner and any(v.aval.shape[:1] == (num_rows,) for v in equation.outvars):
                names.append(equation.primitive.name)

    walk(jax.make_jaxpr(step)(state, ids, target).jaxpr)
    compiled = jax.jit(step, donate_argnums=0).lower(state, ids, target).compile()
    return names, compiled


def test_a_larger_vocabulary_shares_rows_by_hash():
    ids = np.arange(100_000, dtype=np.int32)
    shared = make(vocabulary=len(ids))
    rows = np.asarray(embedding_table.row_of(shared, ids))
    assert rows[0] == 0 and rows.min() == 0 and rows.max() == V - 1
    counts = np.bincount(rows, minlength=V)
    expected = len(ids) / V
    assert np.sum((counts - expected) ** 2 / expected) < 99.6  # chi-square of 49 degrees of freedom, 1 - 1e-5
    np.testing.assert_array_equal(embedding_table.row_of(shared, np.int32([-1, 100_000, 2**31 - 1])), [V, V, V])
    np.testing.assert_array_equal(lookup(shared, ids[:500]), shared.rows[rows[:500]])
    assert not np.any(lookup(shared, np.int32([-1, 100_000])))
    # An update through shared rows is that of the rows.
    rng = np.random.default_rng(4)
    some, grads = rng.choice(ids, M).astype(np.int32), rng.normal(size=(M, D)).astype(np.float32)
    found = row_update(shared, some, grads, RATE, EPS)
    wanted = row_update(make(), rows[some], grads, RATE, EPS)
    np.testing.assert_array_equal(found.rows, wanted.rows)
    np.testing.assert_array_equal(found.accumulator, wanted.accumulator)


def test_a_large_table_is_normal_and_made_without_copies():
    def make_large(key):
        return embedding_table.init_table(key, embedding_table.MANY_ROWS, 4, scale=0.5)

    rows = np.asarray(jax.jit(make_large)(jax.random.key(0)).rows, np.float64) / 0.5
    n = rows.size
    assert abs(rows.mean()) < 4 / np.sqrt(n) and abs(rows.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs((rows**4).mean() - 3) < 4 * np.sqrt(96 / n)
    correlations = np.corrcoef(rows.T)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(len(rows))
    assert abs(np.mean(rows[1:] * rows[:-1])) < 5 / np.sqrt(n)
    assert len(np.unique(rows[:, 0])) > 0.9 * len(rows)
    other = jax.jit(make_large)(jax.random.key(1)).rows
    assert abs(np.corrcoef(rows[:, 0], other[:, 0])[0, 1]) < 5 / np.sqrt(len(rows))
    memory = jax.jit(make_large).lower(jax.random.key(0)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.01 * memory.output_size_in_bytes


def test_the_hash_is_that_of_murmur():
    def mix(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    numbers = [0, 1, 2, 12345, 2**31 - 1, 2**32 - 1]
    np.testing.assert_array_equal(embedding_table.mix(np.uint32(numbers)), [mix(x) for x in numbers])


def test_rounding_at_random_is_right_on_average():
    x = np.float32([[1.0, 1.0 + 1 / 512, -3.1415927, 1e-20, 0.0]])
    salts = np.arange(1, 20_001, dtype=np.float32)
    rounded = np.asarray(jax.jit(rowwise.round_at_random)(np.repeat(x, len(salts), axis=0), salts), np.float64)
    near = np.asarray(x.astype(jnp.bfloat16), np.float64)
    step = np.maximum(np.abs(near) * 2.0**-7, 1e-30)
    assert np.all(np.abs(rounded - x) <= step)  # a neighbour
    assert np.all(rounded[:, [0, 4]] == x[:, [0, 4]])  # what bfloat16 has is kept
    assert np.all(np.abs(rounded.mean(axis=0) - x) < 4 * step / np.sqrt(len(salts)))
    assert 0.2 < np.mean(rounded[:, 1] > x[0, 1]) < 0.3  # a quarter of the way from 1 to the next


def test_bfloat16_rows_follow_float32_ones_over_many_small_steps():
    full, half = make(), make(dtype="bfloat16")
    assert half.rows.nbytes == full.rows.nbytes // 2 and half.accumulator.dtype == jnp.float32
    rng = np.random.default_rng(5)
    for _ in range(400):
        ids, grads = batch(rng)
        grads = 0.01 * (grads + 1.0)  # always one way, in steps that are small next to the rows
        full, half = update(full, ids, grads, 0.003, EPS), update(half, ids, grads, 0.003, EPS)
    touched = np.arange(0, 40, 2)
    moved = np.asarray(full.rows)[touched] - np.asarray(make().rows)[touched]
    error = np.asarray(lookup(half, touched)) - np.asarray(full.rows)[touched]
    assert np.abs(moved.mean()) > 0.04 and np.abs(error.mean()) < 0.02 * np.abs(moved.mean())
    assert np.abs(error).max() < 0.3 * np.abs(moved.mean())


def test_no_gradient_of_the_size_of_the_table():
    names, compiled = table_sized_operations(step_by_rows, 1_000_000)
    assert sorted(names) == ["scatter", "scatter-add"]  # the accumulator and the rows, in place
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 100_000  # a [V, D] float32 array has 64,000,000
    assert memory.alias_size_in_bytes >= 1_000_000 * 17 * 4

    names, compiled = table_sized_operations(step_by_table, 1_000_000)  # the check sees the bug where there is one
    assert len(names) > 2 and compiled.memory_analysis().temp_size_in_bytes > 1_000_000


def test_errors_name_the_numbers():
    with pytest.raises(ValueError, match="table of 0 rows"):
        embedding_table.init_table(jax.random.key(0), 0, 4, 0.1)
    with pytest.raises(ValueError, match="initial_accumulator is -1"):
        embedding_table.init_table(jax.random.key(0), 3, 4, 0.1, -1)
    with pytest.raises(AssertionError):
        row_update(make(), jnp.zeros(3, jnp.int32), jnp.zeros((4, D)), RATE)


FOUR_DEVICES = """
import re, jax, jax.numpy as jnp, numpy as np
from mmrf_jax.models import embedding_table, rowwise
from mmrf_jax.parallel.partitioner import Partitioner
assert jax.device_count() == 4
V, D, M = 4096, 16, 64
rng = np.random.default_rng(0)
ids, grads = rng.integers(0, 300, M).astype(np.int32), rng.normal(size=(M, D)).astype(np.float32)
partitioner = Partitioner()
start = jax.device_get(embedding_table.init_table(jax.random.key(0), V, D, 0.1))  # not on a device: the steps donate
start_on_device = jax.tree.map(jnp.array, start)
expected = rowwise.row_update(start_on_device, ids, grads, 0.3, 1e-8)
for where in (partitioner.replicated_sharding, partitioner.data_sharding):
    state = jax.device_put(start, where)
    step = jax.jit(rowwise.row_update, donate_argnums=0, out_shardings=where)
    args = (state, *partitioner.shard_inputs((ids, grads)), 0.3, 1e-8)
    hlo = step.lower(*args).compile().as_text()
    whole_table = re.compile(r"= \\S*\\[4096,16\\]\\S* (all-gather|all-reduce)")
    gathered = [line for line in hlo.splitlines() if whole_table.search(line)]
    assert not gathered, gathered[0]
    state = step(*args)
    assert state.rows.sharding.is_equivalent_to(where, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, expected)
print("same on four devices")
"""


def test_ids_sharded_over_data_give_the_same_table(run_python):
    assert "same on four devices" in run_python(FOUR_DEVICES, devices=4)
