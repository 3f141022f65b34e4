import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import HANG, ROOT

from mmrf_jax.parallel import sharding

FOUR_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, pytest
from jax.sharding import AxisType
from mmrf_jax.parallel import sharding

mesh = sharding.make_mesh()
assert mesh.shape == {"data": 4} and mesh.axis_types == (AxisType.Auto,)
assert sharding.make_mesh(jax.devices()[:2]).size == 2

sharding.check_divisible(104, mesh)
for batch, fit in ((102, 104), (0, 4), (3, 4)):
    with pytest.raises(ValueError, match=f"batch {batch} is not divisible by 4 devices; use --config.batch={fit}"):
        sharding.check_divisible(batch, mesh)
with pytest.raises(ValueError, match="num_users 5 .* --config.num_users=8"):
    sharding.check_divisible(5, mesh, "num_users")

batch = {"x": np.arange(16.0, dtype=np.float32).reshape(8, 2), "id": np.arange(8, dtype=np.int32)}
placed = sharding.put_batch(batch, mesh)
assert placed["x"].sharding == sharding.sharded(mesh)
assert [s.data.shape for s in placed["x"].addressable_shards] == [(2, 2)] * 4
jax.tree.map(np.testing.assert_array_equal, placed, batch)
with pytest.raises(ValueError, match="batch 6 is not divisible"):
    sharding.put_batch({"x": np.zeros((6, 2))}, mesh)
with pytest.raises(ValueError, match="no leading axis"):
    sharding.put_batch({"x": np.float32(1)}, mesh)
assert sharding.put_replicated(np.ones(3), mesh).sharding == sharding.replicated(mesh)

def rollout(params, user):  # each device goes on for as long as its own users do
    def body(carry):
        turn, x = carry
        return turn + 1, jnp.where(turn < user["id"], x + params["w"] * user["x"].sum(-1), x)
    turns, x = jax.lax.while_loop(lambda c: c[0] < user["id"].max(), body, (0, jnp.zeros(user["id"].shape)))
    return {"x": x, "turns": jnp.full(user["id"].shape, turns)}

params = {"w": jnp.float32(0.5)}
here = jax.jit(sharding.shard_users(rollout, mesh))(sharding.put_replicated(params, mesh), placed)
assert here["x"].sharding.is_equivalent_to(sharding.sharded(mesh), 1)
np.testing.assert_allclose(here["x"], rollout(params, batch)["x"])
np.testing.assert_array_equal(here["turns"], [1, 1, 3, 3, 5, 5, 7, 7])  # no device waits for another
text = jax.jit(sharding.shard_users(rollout, mesh)).lower(params, placed).compile().as_text()
assert "all-reduce" not in text and "all-gather" not in text

def draw(params, key, ids):
    return params["w"] * jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(ids)

keyed = jax.jit(sharding.shard_users(draw, mesh, num_replicated=2))
expected = draw(params, jax.random.key(1), batch["id"])
np.testing.assert_array_equal(keyed(params, jax.random.key(1), placed["id"]), expected)

with pytest.raises(ValueError, match="batch 6 is not divisible by 4 devices"):
    sharding.shard_users(rollout, mesh)(params, {"id": jnp.zeros(6, int), "x": jnp.zeros((6, 2))})
with pytest.raises(ValueError, match="1 arguments of which 1 are replicated"):
    sharding.shard_users(rollout, mesh)(params)
print("all well")
"""


def test_four_devices(run_python):
    assert "all well" in run_python(FOUR_DEVICES, devices=4)


def test_one_device_is_a_mesh_too():
    mesh = sharding.make_mesh(jax.devices()[:1])
    placed = sharding.put_batch(np.ones((3, 2)), mesh)
    out = jax.jit(sharding.shard_users(lambda scale, x: scale * x, mesh))(jnp.float32(2), placed)
    np.testing.assert_array_equal(out, np.full((3, 2), 2.0))
    assert sharding.is_primary()
    with pytest.raises(ValueError, match="mesh of 0 devices"):
        sharding.make_mesh([])


def test_importing_the_rooms_touches_no_device():
    script = """
import mmrf_jax.checkpointing.manager, mmrf_jax.models.rowwise
import mmrf_jax.io.progress, mmrf_jax.io.metric_writer, mmrf_jax.parallel.sharding
import mmrf_jax.sweeps.sweep, mmrf_jax.serving.service
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
