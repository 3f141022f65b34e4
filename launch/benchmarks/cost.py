"""What a function must do, from XLA's own cost analysis, and what this machine can do."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

_COPIED = 2**28  # bytes
_SIDE = {"cpu": 2_048, "gpu": 8_192, "tpu": 8_192}  # of the matrices of a product


class Work(NamedTuple):
    """Operations, and bytes that kernels read and write."""

    flops: float
    bytes: float

    def __add__(self, other: Any) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> Work:
        return Work(self.flops * factor, self.bytes * factor)


class Machine(NamedTuple):
    """What a large matrix product and a large copy reach here, a second."""

    flops: float
    bytes: float

    def rate(self, work: Work) -> float:
        """How often a second `work` could be done: the roofline (Williams et al., CACM 2009).

        On a CPU, of the operations alone: what passes between kernels mostly stays in its caches.
        """
        moved = 0.0 if jax.default_backend() == "cpu" else work.bytes / self.bytes
        return 1.0 / max(work.flops / self.flops, moved)


def work(fn: Callable, *args: Any) -> Work:
    """What one call of `fn` must do; the bodies of scans count as often as they run.

    XLA counts the body of a loop once, whatever its length.
    """
    return _of(jax.make_jaxpr(fn)(*args))


def _of(closed: core.ClosedJaxpr) -> Work:
    total = _once(closed)
    for body, length in _scans(closed.jaxpr):
        total += _of(body).times(length) + _once(body).times(-1)
    return total


def _once(closed: core.ClosedJaxpr) -> Work:
    """What XLA counts."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in closed.in_avals]
    counted = jax.jit(core.jaxpr_as_fun(closed)).lower(*shapes).compile().cost_analysis() or {}
    return Work(counted.get("flops", 0.0), counted.get("bytes accessed", 0.0))


def _scans(jaxpr: core.Jaxpr) -> Iterator[tuple[core.ClosedJaxpr, int]]:
    """Bodies and lengths of the scans that are in no other scan."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn.params["jaxpr"], eqn.params["length"]
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    yield from _scans(inner.jaxpr)
                elif isinstance(inner, core.Jaxpr):
                    yield from _scans(inner)


def seconds(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of `repeats` calls, after one that compiles."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return times[1:]


def machine(repeats: int) -> Machine:
    """Measures the machine."""
    side = _SIDE[jax.default_backend()]
    a = jax.random.normal(jax.random.key(0), (side, side))
    product = jax.jit(lambda a: a @ a)
    copied = jnp.zeros((_COPIED // 4,), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    return Machine(
        flops=2.0 * side**3 / statistics.median(seconds(lambda: product(a), repeats)),
        bytes=2.0 * _COPIED / statistics.median(seconds(lambda: copy(copied), repeats)),
    )


def alone(function: Callable, *arguments: Any) -> Any:
    """What a function returns that has a fresh process to itself."""
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process, which ends the other
    with multiprocessing.get_context("spawn").Pool(1, signal.signal, ignore) as process:
        return process.apply(function, arguments)


def peak_memory() -> float:
    """GiB that this process, or one that it started, held at most; on an accelerator, of the device's memory."""
    held = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    here = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return here / 2**20 if held is None else held / 2**30
