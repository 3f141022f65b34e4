"""The partitioner: the mesh, and what of state and inputs is on which device.

Only `parallel` uses Mesh, NamedSharding, PartitionSpec and process_index.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmrf_jax.parallel import programs
from mmrf_jax.types import PyTree

_DATA = "data"  # name of the only axis


class Partitioner:
    """Splits work over devices: inputs are sharded by users, state is replicated except for large embedding tables.

    Steps of training are jitted without shardings: the compiler derives theirs from those of the state and the inputs.
    Partitioners of the same devices are equal, so that one can be a static argument of a program.

    Args:
      devices: of a mesh with one axis, `data`; None for all devices of all processes.

    Attributes:
      data_sharding: splits the leading axis over the devices.
      replicated_sharding: puts the whole array on every device.

    Raises:
      ValueError: for no devices.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        devices = jax.devices() if devices is None else list(devices)
        if not devices:
            raise ValueError("a partitioner of 0 devices; pass at least one, or None for all")
        # Not `jax.make_mesh`: on TPUs its order is that of the network, in which a process's devices are not together.
        self._mesh: Mesh = Mesh(np.array(_in_process_order(devices)), (_DATA,), axis_types=(AxisType.Auto,))
        self.data_sharding = NamedSharding(self._mesh, PartitionSpec(_DATA))
        self.replicated_sharding = NamedSharding(self._mesh, PartitionSpec())

    @classmethod
    def local(cls) -> Partitioner:
        """Return the partitioner of this process's devices."""
        return cls(jax.local_devices())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partitioner) and self._mesh == other._mesh

    def __hash__(self) -> int:
        return hash(self._mesh)

    @property
    def num_devices(self) -> int:
        """Return the number of devices, of all processes."""
        return self._mesh.size

    def check_divisible(self, batch: int, name: str = "batch") -> None:
        """Check that a batch splits evenly over the devices.

        Args:
          batch: size of the leading axis.
          name: config field to name in the error.

        Raises:
          ValueError: if it does not; the message gives the next larger size that does.
        """
        _check_divisible(batch, self.num_devices, name)

    def local_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of a batch [B, ...] that this process passes to `shard_inputs`."""
        share = len(rows) // self._mesh.size * self._mesh.local_mesh.size
        first = share * jax.process_index()
        return rows[first : first + share] if share < len(rows) else rows

    def shard_inputs(self, tree: PyTree) -> PyTree:
        """Convert host arrays to global arrays, split over the devices along their leading axis.

        Each of several processes holds and passes its own part, all of equal size, in process order.

        Args:
          tree: NumPy arrays [B, ...] with the same B.

        Raises:
          ValueError: if B does not split over this process's devices.
        """
        here = self._mesh.local_mesh.size
        for array in jax.tree.leaves(tree):
            if np.ndim(array) == 0:
                raise ValueError("a scalar in a batch has no leading axis to split; replicate it instead")
            _check_divisible(np.shape(array)[0], here)
        sharding = self.data_sharding
        if here == self._mesh.size:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, np.asarray(array)), tree)

    def replicate(self, tree: PyTree) -> PyTree:
        """Convert arrays to global arrays on every device; every process passes the same values."""
        if self.replicated_sharding.is_fully_addressable:
            return jax.device_put(tree, self.replicated_sharding)
        return jax.tree.map(lambda x: _put_on_all(x, self.replicated_sharding), tree)

    def gather_rows(self, table: jax.Array, rows: jax.Array) -> jax.Array:
        """Gather rows of an array that is split over the devices, under jit; only what is gathered is communicated.

        Args:
          table: [V, D] integers, split over the devices.
          rows: [B, ...] int32 in [0, V), the same on all devices.

        Returns:
          [B, ..., D], split over the devices along B.
        """
        if self.num_devices == 1:
            return table[rows]

        def one_device(rows, table):
            own = rows - table.shape[0] * jax.lax.axis_index(_DATA)
            mine = (own >= 0) & (own < table.shape[0])
            found = jnp.where(mine[..., None], table[jnp.where(mine, own, 0)], 0)
            return jax.lax.psum_scatter(found, _DATA, tiled=True)

        specs = (PartitionSpec(), PartitionSpec(_DATA))
        return jax.shard_map(
            one_device, mesh=self._mesh, in_specs=specs, out_specs=PartitionSpec(_DATA), check_vma=False
        )(rows, table)

    def partition_init(self, init: Callable[..., PyTree], shapes: PyTree, **kwargs: Any) -> programs.Program:
        """Compile the initialisation of a state so that each array is created with its final sharding.

        Args:
          init: returns the state.
          shapes: of the state, with shardings on these devices.
          kwargs: arguments of `jax.jit`.
        """
        shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
        return programs.Program(init, calls="few", out_shardings=shardings, **kwargs)

    def shard_users(self, fn: Callable[..., PyTree], num_replicated: int = 1) -> Callable[..., PyTree]:
        """Run `fn` on each device separately, over that device's users, with no communication or common trip count.

        A `while_loop` in `fn` ends on each device when that device's users are done. Under plain jit it would need a
        sum over all devices in every iteration.

        Args:
          fn: (*replicated, *per_user) -> per_user; it sees B / devices users, and must not depend on how many they are.
          num_replicated: number of leading arguments that are whole on every device (parameters, keys, the step).

        Returns:
          A function of global arrays, to be called under jit: per-user leaves are [B, ...], in and out.
        """

        def run(*args: Any) -> PyTree:
            if len(args) <= num_replicated:
                raise ValueError(
                    f"{len(args)} arguments of which {num_replicated} are replicated; at least one has users"
                )
            specs = tuple(PartitionSpec() if i < num_replicated else PartitionSpec(_DATA) for i in range(len(args)))
            for leaf in jax.tree.leaves(args[num_replicated:]):
                self.check_divisible(leaf.shape[0])
            # check_vma=False: the body has no collectives, and loop carries need no annotation of variation by device.
            return jax.shard_map(fn, mesh=self._mesh, in_specs=specs, out_specs=PartitionSpec(_DATA), check_vma=False)(
                *args
            )

        return run


def _in_process_order(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Sort devices so that those of a process are together, in the order of processes, as `local_rows` counts."""
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def _check_divisible(batch: int, devices: int, name: str = "batch") -> None:
    if batch < 1 or batch % devices:
        fit = max(-(-batch // devices), 1) * devices
        raise ValueError(f"{name} {batch} is not divisible by {devices} devices; use --config.{name}={fit}")


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
