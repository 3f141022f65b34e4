"""The mesh, its two shardings, and per-device execution over users.

This is the only module that uses Mesh, PartitionSpec and process_index. State is replicated; arrays with a leading axis
of users are split over `data`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmrf_jax.types import PyTree

#: Name of the only axis.
DATA = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh with one axis, `data`, over the given devices; by default over all devices of all processes.

    Raises:
      ValueError: for no devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("a mesh of 0 devices; pass at least one, or None for all")
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the leading axis over `data`."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def check_divisible(batch: int, mesh: Mesh, name: str = "batch") -> None:
    """Check that a batch splits evenly over the devices.

    Args:
      batch: size of the leading axis.
      mesh: the devices.
      name: config field to name in the error.

    Raises:
      ValueError: if it does not; the message gives the next larger size that does.
    """
    if batch < 1 or batch % mesh.size:
        fit = max(-(-batch // mesh.size), 1) * mesh.size
        raise ValueError(f"{name} {batch} is not divisible by {mesh.size} devices; use --config.{name}={fit}")


def put_batch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Convert host arrays to global arrays, split over `data` along their leading axis.

    Each of several processes holds and passes its own part, all of equal size, in process order.

    Args:
      tree: NumPy arrays [B, ...] with the same B.
      mesh: the devices.

    Raises:
      ValueError: if B does not split over this process's devices.
    """
    local = mesh.local_mesh
    for array in jax.tree.leaves(tree):
        if np.ndim(array) == 0:
            raise ValueError("a scalar in a batch has no leading axis to split; replicate it instead")
        check_divisible(np.shape(array)[0], local)
    sharding = sharded(mesh)
    if local.size == mesh.size:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, np.asarray(array)), tree)


def own_part(rows: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Return the rows of a batch [B, ...] that this process passes to `put_batch`."""
    share = len(rows) // mesh.size * mesh.local_mesh.size
    first = share * jax.process_index()
    return rows[first : first + share] if share < len(rows) else rows


def put_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Convert arrays to global arrays on every device; every process passes the same values."""
    sharding = replicated(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: _put_on_all(x, sharding), tree)


def _put_on_all(x: Any, sharding: NamedSharding) -> jax.Array:
    """Put an array on all devices; local arrays go through the host, since device_put would compare all processes."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        wrap = functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(x))
        return jax.jit(wrap, out_shardings=sharding)(np.asarray(jax.random.key_data(x)))
    host = np.asarray(x)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype))
    return jax.make_array_from_callback(host.shape, sharding, lambda _: host)


def local(tree: PyTree) -> PyTree:
    """Convert global arrays to arrays local to this process, whole on each of its devices, without waiting for others.

    Arrays split over several processes are gathered whole, so all processes must call this.
    """

    here = replicated(local_mesh())

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        if not x.is_fully_replicated:
            return jax.device_put(fetch(x), here)
        return jax.make_array_from_single_device_arrays(x.shape, here, [shard.data for shard in x.addressable_shards])

    return jax.tree.map(one, tree)


def local_mesh() -> Mesh:
    """Return a mesh of this process's devices."""
    return make_mesh(jax.local_devices())


def fetch(x: jax.Array) -> np.ndarray:
    """Return the whole of a global array on the host; every process must call it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def shard_users(fn: Callable[..., PyTree], mesh: Mesh, num_replicated: int = 1) -> Callable[..., PyTree]:
    """Run `fn` on each device separately, over that device's users, with no communication or common trip count.

    A `while_loop` in `fn` ends on each device when that device's users are done. Under plain jit it would need a sum
    over all devices in every iteration.

    Args:
      fn: (*replicated, *per_user) -> per_user; it sees B / devices users, and must not depend on how many they are.
      mesh: the devices.
      num_replicated: number of leading arguments that are whole on every device (parameters, keys, the step).

    Returns:
      A function of global arrays, to be called under jit: per-user leaves are [B, ...], in and out.
    """

    def run(*args: Any) -> PyTree:
        if len(args) <= num_replicated:
            raise ValueError(f"{len(args)} arguments of which {num_replicated} are replicated; at least one has users")
        specs = tuple(PartitionSpec() if i < num_replicated else PartitionSpec(DATA) for i in range(len(args)))
        for leaf in jax.tree.leaves(args[num_replicated:]):
            check_divisible(leaf.shape[0], mesh)
        # check_vma=False: the body has no collectives, and loop carries need no annotation of per-device variation.
        return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(DATA), check_vma=False)(*args)

    return run


def is_primary() -> bool:
    """Return whether this process is the one that writes results and prints."""
    return jax.process_index() == 0
