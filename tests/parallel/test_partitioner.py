import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax.parallel import multihost
from mmrf_jax.parallel.partitioner import Partitioner, _in_process_order

FOUR_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, pytest
from jax.sharding import AxisType
from mmrf_jax.parallel.partitioner import Partitioner

partitioner = Partitioner()
mesh = partitioner.data_sharding.mesh
assert mesh.shape == {"data": 4} and mesh.axis_types == (AxisType.Auto,)
assert partitioner.num_devices == 4 and Partitioner(jax.devices()[:2]).num_devices == 2
assert len({partitioner, Partitioner(), Partitioner.local(), Partitioner(jax.devices()[:2])}) == 2  # equal by devices

assert list(Partitioner(jax.devices()[::-1]).data_sharding.mesh.devices) == jax.devices()

partitioner.check_divisible(104)
for batch, fit in ((102, 104), (0, 4), (3, 4)):
    with pytest.raises(ValueError, match=f"batch {batch} is not divisible by 4 devices; use --config.batch={fit}"):
        partitioner.check_divisible(batch)
with pytest.raises(ValueError, match="num_users 5 .* --config.num_users=8"):
    partitioner.check_divisible(5, "num_users")

batch = {"x": np.arange(16.0, dtype=np.float32).reshape(8, 2), "id": np.arange(8, dtype=np.int32)}
placed = partitioner.shard_inputs(batch)
assert placed["x"].sharding == partitioner.data_sharding
assert [s.data.shape for s in placed["x"].addressable_shards] == [(2, 2)] * 4
jax.tree.map(np.testing.assert_array_equal, placed, batch)
with pytest.raises(ValueError, match="batch 6 is not divisible"):
    partitioner.shard_inputs({"x": np.zeros((6, 2))})
with pytest.raises(ValueError, match="no leading axis"):
    partitioner.shard_inputs({"x": np.float32(1)})
assert partitioner.replicate(np.ones(3)).sharding == partitioner.replicated_sharding
assert (partitioner.local_rows(np.arange(8)) == np.arange(8)).all()  # of the only process

where = {"table": partitioner.data_sharding, "step": partitioner.replicated_sharding}
shapes = {name: jax.ShapeDtypeStruct((8,), jnp.int32, sharding=sharding) for name, sharding in where.items()}
init = partitioner.partition_init(lambda n: {name: n + jnp.arange(8) for name in where}, shapes)
state = init(jnp.int32(1))
assert {name: x.sharding for name, x in state.items()} == where
np.testing.assert_array_equal(state["table"], np.arange(1, 9))

def rollout(params, user):  # each device goes on for as long as its own users do
    def body(carry):
        turn, x = carry
        return turn + 1, jnp.where(turn < user["id"], x + params["w"] * user["x"].sum(-1), x)
    turns, x = jax.lax.while_loop(lambda c: c[0] < user["id"].max(), body, (0, jnp.zeros(user["id"].shape)))
    return {"x": x, "turns": jnp.full(user["id"].shape, turns)}

params = {"w": jnp.float32(0.5)}
here = jax.jit(partitioner.shard_users(rollout))(partitioner.replicate(params), placed)
assert here["x"].sharding.is_equivalent_to(partitioner.data_sharding, 1)
np.testing.assert_allclose(here["x"], rollout(params, batch)["x"])
np.testing.assert_array_equal(here["turns"], [1, 1, 3, 3, 5, 5, 7, 7])  # no device waits for another
text = jax.jit(partitioner.shard_users(rollout)).lower(params, placed).compile().as_text()
assert "all-reduce" not in text and "all-gather" not in text

def draw(params, key, ids):
    return params["w"] * jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(ids)

keyed = jax.jit(partitioner.shard_users(draw, num_replicated=2))
expected = draw(params, jax.random.key(1), batch["id"])
np.testing.assert_array_equal(keyed(params, jax.random.key(1), placed["id"]), expected)

with pytest.raises(ValueError, match="batch 6 is not divisible by 4 devices"):
    partitioner.shard_users(rollout)(params, {"id": jnp.zeros(6, int), "x": jnp.zeros((6, 2))})
with pytest.raises(ValueError, match="1 arguments of which 1 are replicated"):
    partitioner.shard_users(rollout)(params)
print("all well")
"""


def test_four_devices(run_python):
    assert "all well" in run_python(FOUR_DEVICES, devices=4)


def test_one_device():
    partitioner = Partitioner(jax.devices()[:1])
    placed = partitioner.shard_inputs(np.ones((3, 2)))
    out = jax.jit(partitioner.shard_users(lambda scale, x: scale * x))(jnp.float32(2), placed)
    np.testing.assert_array_equal(out, np.full((3, 2), 2.0))
    assert multihost.is_primary()
    with pytest.raises(ValueError, match="partitioner of 0 devices"):
        Partitioner([])


def test_the_devices_of_a_process_are_together():
    """Of a TPU v3-32 the ids, which follow the network, alternate between processes."""

    def device(process, number):
        return types.SimpleNamespace(process_index=process, id=number)

    devices = [device(number // 4 % 2, number) for number in range(16)]
    found = [(x.process_index, x.id) for x in _in_process_order(devices)]
    assert found == [(0, n) for n in (0, 1, 2, 3, 8, 9, 10, 11)] + [(1, n) for n in (4, 5, 6, 7, 12, 13, 14, 15)]


def test_importing_the_rooms_touches_no_device(run_python):
    """Neither here nor in the process that it is a fork of, which has imported most of them."""
    script = """
import mmrf_jax.checkpointing.manager, mmrf_jax.models.rowwise
import mmrf_jax.io.progress, mmrf_jax.io.metric_writer, mmrf_jax.parallel.partitioner
import mmrf_jax.sweeps.sweep, mmrf_jax.serving.service
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    run_python(script)
