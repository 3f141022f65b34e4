"""Cost of a function from XLA's cost analysis, and the throughput of this machine."""

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
_SIDE = {"cpu": 2_048, "gpu": 8_192, "tpu": 8_192}  # of the square matrices in the product


class Work(NamedTuple):
    """Floating-point operations, and bytes that kernels read and write."""

    flops: float
    bytes: float

    def __add__(self, other: Any) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> Work:
        return Work(self.flops * factor, self.bytes * factor)


class Machine(NamedTuple):
    """Throughput of a large matrix product and of a large copy on this machine, per second."""

    flops: float
    bytes: float

    def rate(self, work: Work) -> float:
        """Return how often per second `work` could be done: the roofline (Williams et al., CACM 2009).

        On a CPU only operations count: data passed between kernels mostly stays in cache.
        """
        moved = 0.0 if jax.default_backend() == "cpu" else work.bytes / self.bytes
        return 1.0 / max(work.flops / self.flops, moved)


def work(fn: Callable, *args: Any) -> Work:
    """Return the work of one call of `fn`, with the bodies of scans multiplied by their lengths.

    XLA itself counts the body of a loop once, whatever its length.
    """
    return _of(jax.make_jaxpr(fn)(*args))


def _of(closed: core.ClosedJaxpr) -> Work:
    total = _once(closed)
    for body, length in _scans(closed.jaxpr):
        total += _of(body).times(length) + _once(body).times(-1)
    return total


def _once(closed: core.ClosedJaxpr) -> Work:
    """Return XLA's own count."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in closed.in_avals]
    counted = jax.jit(core.jaxpr_as_fun(closed)).lower(*shapes).compile().cost_analysis() or {}
    return Work(counted.get("flops", 0.0), counted.get("bytes accessed", 0.0))


def _scans(jaxpr: core.Jaxpr) -> Iterator[tuple[core.ClosedJaxpr, int]]:
    """Yield bodies and lengths of the outermost scans."""
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
    """Return the seconds of `repeats` calls, after one call that compiles."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return times[1:]


def machine(repeats: int) -> Machine:
    """Measure this machine."""
    side = _SIDE[jax.default_backend()]
    a = jax.random.normal(jax.random.key(0), (side, side))
    product = jax.jit(lambda a: a @ a)
    copied = jnp.zeros((_COPIED // 4,), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    return Machine(
        flops=2.0 * side**3 / statistics.median(seconds(lambda: product(a), repeats)),
        bytes=2.0 * _COPIED / statistics.median(seconds(lambda: copy(copied), repeats)),
    )


def alone(function: Callable, *arguments: Any, limit: float | None = None) -> Any:
    """Call a function in a fresh process and return its result.

    Args:
      function: the function.
      arguments: its arguments.
      limit: seconds after which the process is ended; None for no limit.

    Raises:
      RuntimeError: if the process dies, as for want of memory, or at its limit.
      Exception: what the function raises.
    """
    fresh = multiprocessing.get_context("spawn")
    answers, answer = fresh.Pipe(duplex=False)
    process = fresh.Process(target=_answer, args=(answer, function, arguments))
    process.start()
    answer.close()  # so that the other end's death ends the wait
    try:
        if not answers.poll(limit):
            raise RuntimeError(f"not done after {limit:.0f} s")
        result, error = answers.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that measures died with exit code {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()
    if error is not None:
        raise error
    return result


def _answer(answer: Any, function: Callable, arguments: tuple) -> None:
    """Send the result of a call, or its error, to the process that waits for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process handles Ctrl-C and ends this one
    result, error = None, None
    try:
        result = function(*arguments)
    except Exception as raised:
        error = raised
    answer.send((result, error))


def devices() -> tuple[str, list[str]]:
    """Return JAX's backend, and the names of its devices."""
    return jax.default_backend(), [f"{device}, {device.device_kind}" for device in jax.devices()]


def peak_memory() -> float:
    """Return the peak memory in GiB of this process or of its children; on an accelerator, of the device."""
    held = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    here = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return here / 2**20 if held is None else held / 2**30
