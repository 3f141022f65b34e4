"""States to save, and what is compared of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmrf_jax.checkpointing.manager import targets


@struct.dataclass
class State:
    params: Any
    tables: Any
    key: Any
    step: Any
    done: Any
    nothing: Any = None
    name: str = struct.field(pytree_node=False, default="static")


def make_state(seed=0, rows=300):
    key = jax.random.key(seed)
    params = {"dense": {"kernel": jax.random.normal(key, (rows, 7)), "half": jnp.ones(3, jnp.bfloat16) / 3}}
    params["empty"] = (jnp.zeros((0, 4)), {})
    params["nan"] = jnp.array([jnp.nan, -0.0, jnp.inf])
    tables = {"id": jax.random.normal(key, (rows, 3)).astype(jnp.bfloat16), "user": jnp.arange(rows, dtype=jnp.float32)}
    return State(params, tables, jax.random.split(key, 5), jnp.int32(seed), jnp.array([True, False]))


def bits(tree):
    raw = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    return jax.tree.map(lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes()), raw)


def like(state):
    return targets(jax.eval_shape(lambda: state), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
