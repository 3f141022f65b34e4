"""Multi-process runs: joining, work on the first process only, and data of one process or of all.

All functions also work for a single process, at no cost.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mmrf_jax.parallel import heartbeat
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.types import PyTree

_HEARTBEAT_SECONDS = 120  # until JAX misses a process and aborts, should the heartbeats not have noticed
_SHUTDOWN_SECONDS = 600  # that a process waits for the others when it ends


class FailedElsewhere(RuntimeError):
    """An error of another process, which has already reported it."""


_monitor: heartbeat.HeartbeatMonitor | None = None  # of this process's run


def _end(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(1)


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    moved: Callable[[], int] = lambda: 0,
    end: Callable[[str], object] = _end,
    limits: heartbeat.Limits = heartbeat.LIMITS,
) -> None:
    """Join this process to a multi-process run; call it before any device is used.

    Without addresses JAX finds the other processes if SLURM, Open MPI, Cloud TPU or Kubernetes started them.

    Args:
      coordinator_address: HOST:PORT of the first process.
      num_processes: number of processes of the run.
      process_id: index of this process, from 0.
      moved: returns a count that grows while this process makes progress.
      end: (line) -> ends this process, in another thread, when one of the others is lost.
      limits: times until a process counts as lost.

    Raises:
      ProcessLost: if a process does not join in time.
      ValueError: if only some of the three are given, or none and no launcher has started several processes.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"--{missing[0]} is missing; give all of {', '.join(f'--{name}' for name in given)}, or none")
    local: Sequence[int] | None = None
    if missing:
        coordinator_address, num_processes, process_id, local = _detect(limits.join)
    global _monitor
    if coordinator_address is not None and num_processes is not None and num_processes > 1 and process_id is not None:
        _monitor = heartbeat.HeartbeatMonitor(coordinator_address, num_processes, process_id, moved, end, limits)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            local_device_ids=local,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        flags = ", ".join(f"--{name}" for name in given)
        raise ValueError(
            f"no SLURM, Open MPI, Cloud TPU or Kubernetes has started several processes here ({error}); give {flags}"
        ) from error


def _detect(seconds: float) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """Return what a launcher says: address of the first process, number, index, and local devices; None if unknown."""
    from jax._src import clusters  # JAX has no public name for it

    return clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(seconds))


def meet() -> None:
    """Wait for all processes in a sum over all devices.

    On CPUs Gloo connects the devices at their first common operation, and gives them 30 s to come. Programs compile for
    longer on some hosts than on others, so the first operation must not be one of those.
    """
    if jax.process_count() > 1:
        every = Partitioner()
        ones = every.shard_inputs(np.ones(len(jax.local_devices()), np.int32))
        jax.block_until_ready(jax.jit(jnp.sum, out_shardings=every.replicated_sharding)(ones))


def lost(seconds: float) -> str | None:
    """Return the line that names a lost process of this run, waiting for it; None if all are there."""
    return None if _monitor is None else _monitor.lost(seconds)


def leave() -> None:
    """Leave the run in agreement with the other processes, which do not miss this one from now on."""
    if _monitor is not None:
        _monitor.leave()


def is_primary() -> bool:
    """Return whether this process is the one that writes results and prints."""
    return jax.process_index() == 0


def num_processes() -> int:
    """Return the number of processes of this run."""
    return jax.process_count()


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


def share_out(fn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Return `fn` of each item, each computed by one process; all must call this with the same items.

    Like `map`, with results that can be pickled. `fn` may not wait for other processes.

    Raises:
      FailedElsewhere: if `fn` failed in another process, which raises the error itself.
    """
    if jax.process_count() == 1:
        return [fn(item) for item in items]
    items, mine, error = list(items), dict[int, Any](), None
    try:
        mine = {i: fn(items[i]) for i in range(jax.process_index(), len(items), jax.process_count())}
    except Exception as caught:
        error = caught
    said = [pickle.loads(x) for x in gather(pickle.dumps((mine, error and f"{type(error).__name__}: {error}")))]
    if error is not None:
        leave()  # the others know
        raise error
    if failed := [text for _, text in said if text]:
        raise FailedElsewhere(failed[0])
    every = {i: result for part, _ in said for i, result in part.items()}
    return [every[i] for i in range(len(items))]


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
        leave()  # the others know
        raise error
    if "error" in answer:
        raise FailedElsewhere(answer["error"])
    return answer["value"]
