"""Multi-process runs: joining, work on the first process only, and data of one process or of all.

All functions also work for a single process, at no cost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.types import PyTree

_HEARTBEAT_SECONDS = 20  # without a heartbeat until a process counts as dead
_SHUTDOWN_SECONDS = 600  # that a process waits for the others when it ends


class FailedElsewhere(RuntimeError):
    """An error of the first process, which has already reported it."""


def join(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join this process to a multi-process run; call it before any device is used.

    Without arguments JAX finds the other processes if SLURM, Open MPI, Cloud TPU or Kubernetes started them.

    Args:
      coordinator_address: HOST:PORT of the first process.
      num_processes: number of processes of the run.
      process_id: index of this process, from 0.

    Raises:
      ValueError: if only some of the three are given, or none and no launcher has started several processes.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"--{missing[0]} is missing; give all of {', '.join(f'--{name}' for name in given)}, or none")
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        flags = ", ".join(f"--{name}" for name in given)
        raise ValueError(
            f"no SLURM, Open MPI, Cloud TPU or Kubernetes has started several processes here ({error}); give {flags}"
        ) from error


def is_primary() -> bool:
    """Return whether this process is the one that writes results and prints."""
    return jax.process_index() == 0


def share(number: int) -> tuple[int, int]:
    """Return the first index of this process's share of `number` items, and its size; one process gets all."""
    each = -(-number // jax.process_count())
    first = min(each * jax.process_index(), number)
    return first, min(each, number - first)


def gather(data: bytes) -> list[bytes]:
    """Return the bytes that each process passes, in process order; every process gets all."""
    if jax.process_count() == 1:
        return [data]
    lengths = np.asarray(multihost_utils.process_allgather(np.array(divmod(len(data), 2**30), np.int32)))
    sizes = [int(high) * 2**30 + int(low) for high, low in lengths]
    mine = np.zeros(max(*sizes, 1), np.uint8)
    mine[: len(data)] = np.frombuffer(data, np.uint8)
    every = np.asarray(multihost_utils.process_allgather(mine))
    return [row[:size].tobytes() for row, size in zip(every, sizes, strict=True)]


def gather_rows(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Concatenate arrays [n_p, ...] of all processes along the first axis, in process order; keeps 64-bit types."""
    if jax.process_count() == 1:
        return list(arrays)
    joined = []
    for array in arrays:
        parts = gather(np.ascontiguousarray(array).tobytes())
        joined.append(np.concatenate([np.frombuffer(x, array.dtype).reshape(-1, *array.shape[1:]) for x in parts]))
    return joined


def fetch(x: jax.Array) -> np.ndarray:
    """Return the whole of a global array on the host; every process must call it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def to_local(tree: PyTree) -> PyTree:
    """Convert global arrays to arrays local to this process, whole on each of its devices, without waiting for others.

    Arrays split over several processes are gathered whole, so all processes must call this.
    """
    here = Partitioner.local().replicated_sharding

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        if not x.is_fully_replicated:
            return jax.device_put(fetch(x), here)
        return jax.make_array_from_single_device_arrays(x.shape, here, [shard.data for shard in x.addressable_shards])

    return jax.tree.map(one, tree)


def in_turn(fn: Callable[[], Any]) -> Any:
    """Call `fn` in the first process, then in the others, which find the files it wrote; return the local result."""
    made: list[Any] = []
    on_primary(lambda: made.append(fn()))
    return made[0] if made else fn()


def on_primary(fn: Callable[[], Any]) -> Any:
    """Call `fn` in the first process only and return its JSON-serialisable result in every process.

    Raises:
      FailedElsewhere: in the other processes, if `fn` failed in the first, which raises the error itself.
    """
    if jax.process_count() == 1:
        return fn()
    error: BaseException | None = None
    text = ""
    if jax.process_index() == 0:
        try:
            text = json.dumps({"value": fn()})
        except BaseException as caught:  # an interrupt or exit too: the others wait for an answer
            text, error = json.dumps({"error": f"{type(caught).__name__}: {caught}"}), caught
    answer = json.loads(gather(text.encode())[0])
    if error is not None:
        raise error
    if "error" in answer:
        raise FailedElsewhere(answer["error"])
    return answer["value"]
