"""The compiled programs of a run: options by how often a program runs, and compilation ahead of the first call.

XLA compiles without Python's lock. A run lowers what it will need when it starts and compiles it in threads while the
first log is collected, so the wait is that of the longest program and not of their sum.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax

# Options on CPUs, by processor time of the update of the agents: seconds to compile it, and milliseconds of a step.
_OFTEN = {"xla_backend_optimization_level": 1}  # 11.9 and 101; the default compiles longer to programs as fast
_SOME = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}  # 7.0 and 118
_ONCE = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # 3.0 and 313
_PATIENCE = 0.5  # seconds between two looks at whether the run is told to stop


_quick = False


def compile_quickly() -> None:
    """Lets hot programs be compiled for a hundred calls rather than thousands, from here on in this process."""
    global _quick
    _quick = True


class Program:
    """A function to be jitted, with options that depend on the backend, which is known when it is first called.

    Args:
      function: what to compile. often: whether it runs many times in a run, or else a few. kwargs: of `jax.jit`.
    """

    def __init__(self, function: Callable[..., Any], often: bool, **kwargs: Any):
        functools.update_wrapper(self, function)
        self._function, self._often, self._kwargs = function, often, kwargs

    @functools.cached_property
    def jitted(self) -> Any:
        """The jitted function."""
        options = None
        if jax.default_backend() == "cpu" and not jax.config.read("jax_disable_most_optimizations"):
            options = (_SOME if _quick else _OFTEN) if self._often else _ONCE
        return jax.jit(self._function, compiler_options=options, **self._kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs))):
            return self._function(*args, **kwargs)  # a part of another program, which has options of its own
        return self.jitted(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """See `jax.stages.Wrapped.lower`."""
        return self.jitted.lower(*args, **kwargs)

    def _cache_size(self) -> int:
        return self.jitted._cache_size()


def program(*, often: bool, **kwargs: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a function that a run compiles; see `Program`."""
    return lambda function: Program(function, often, **kwargs)


class CompileClock:
    """Seconds that the main thread has spent on tracing, lowering and compiling since it was made; close it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/") and threading.current_thread() is threading.main_thread():
            self.seconds += duration_secs

    def close(self) -> None:
        """Counts no more."""
        jax.monitoring.unregister_event_duration_listener(self._add)


class Ahead:
    """Compiles programs in threads, in the order given; a program is waited for before its first call."""

    def __init__(self) -> None:
        self._jobs: dict[str, futures.Future[None]] = {}
        self._gate, self._closed = threading.BoundedSemaphore(os.cpu_count() or 1), False
        self.waited = 0.0  # seconds

    def close(self) -> None:
        """Begins to compile nothing more; what is being compiled has to be waited for when the process ends."""
        self._closed = True

    def add(self, name: str, lower: Callable[[], Any]) -> None:
        """Begins to compile a program.

        Args:
          lower: gives it lowered for the arguments that it will have: their shapes, types and shardings.
        """
        job: futures.Future[None] = futures.Future()
        self._jobs[name] = job
        threading.Thread(target=self._compile, args=(job, lower), name=f"compile {name}").start()

    def _compile(self, job: futures.Future[None], lower: Callable[[], Any]) -> None:
        with self._gate, contextlib.suppress(Exception):  # the call itself will say what is wrong
            if not self._closed:
                lower().compile()
        job.set_result(None)

    def wait(self, name: str, check: Callable[[], None] = lambda: None, say: Callable[[str], None] = print) -> None:
        """Returns when a program is compiled, or was never begun.

        Args:
          check: called again and again; it may raise. say: is given a line if there is something to wait for.
        """
        job = self._jobs.pop(name, None)
        if job is None or job.done():
            return
        say(f"compiling: {name}")
        start = time.monotonic()
        while not futures.wait([job], timeout=_PATIENCE).done:
            check()
        self.waited += time.monotonic() - start
