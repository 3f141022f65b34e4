"""Compiled programs of a run: compiler options by call frequency, and ahead-of-time compilation.

XLA compiles without the GIL. At its start a run lowers the programs it will need and compiles them in threads while it
collects the first log. The wait is then that of the longest program instead of the sum of all.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, Literal

import jax

Calls = Literal["many", "some", "few"]  # of a program or its loop in a run: thousands, tens to hundreds, or a few

# Options on CPUs. Measured on the update of the agents: CPU seconds to compile, and milliseconds per step.
_EMITTERS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11, 1) else {}  # later: no choice
_OPTIONS: dict[Calls, dict[str, Any]] = {
    "many": {"xla_backend_optimization_level": 1},  # 11.9 and 101; the default compiles longer, for no gain in speed
    "some": {"xla_backend_optimization_level": 1, **_EMITTERS},  # 7.0 and 118
    "few": {"xla_backend_optimization_level": 0, **_EMITTERS},  # 3.0 and 313
}
_PATIENCE = 0.5  # seconds between two checks for a stop signal


_quick = False


def compile_quickly(quick: bool = True) -> bool:
    """Compile programs of many calls as those of some calls, from now on in this process.

    Returns:
      The choice before this call.
    """
    global _quick
    before, _quick = _quick, quick
    return before


class Program:
    """A function to jit, with compiler options that depend on the backend; the backend is read at the first call.

    Args:
      function: the function to compile.
      calls: how often a run calls it or, if it is a loop, its body.
      kwargs: arguments of `jax.jit`.
    """

    def __init__(self, function: Callable[..., Any], calls: Calls, **kwargs: Any):
        functools.update_wrapper(self, function)
        self._function, self._calls, self._kwargs = function, calls, kwargs
        self._jitted: dict[bool, Any] = {}  # by `compile_quickly`

    @property
    def jitted(self) -> Any:
        """Return the jitted function."""
        if (found := self._jitted.get(_quick)) is not None:
            return found
        options = None
        if jax.default_backend() == "cpu" and not jax.config.read("jax_disable_most_optimizations"):
            options = _OPTIONS["some" if _quick and self._calls == "many" else self._calls]
        self._jitted[_quick] = found = jax.jit(self._function, compiler_options=options, **self._kwargs)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs))):
            return self._function(*args, **kwargs)  # part of another program, which has its own options
        return self.jitted(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Lower the function; see `jax.stages.Wrapped.lower`."""
        return self.jitted.lower(*args, **kwargs)

    def _cache_size(self) -> int:
        return self.jitted._cache_size()


def program(*, calls: Calls, **kwargs: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function that a run compiles; see `Program`."""
    return lambda function: Program(function, calls, **kwargs)


class CompileClock:
    """Seconds that the main thread has spent on tracing, lowering and compiling since creation; close it after use."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/") and threading.current_thread() is threading.main_thread():
            self.seconds += duration_secs

    def close(self) -> None:
        """Stop counting."""
        jax.monitoring.unregister_event_duration_listener(self._add)


class Ahead:
    """Compiles programs in threads, in the given order; callers wait for a program before its first call."""

    def __init__(self) -> None:
        self._jobs: dict[str, futures.Future[None]] = {}
        self._gate, self._closed = threading.BoundedSemaphore(os.cpu_count() or 1), False
        self.waited = 0.0  # seconds

    def close(self) -> None:
        """Start no further compilation; compilations in progress still delay the end of the process."""
        self._closed = True

    def add(self, name: str, lower: Callable[[], Any]) -> None:
        """Start compiling a program.

        Args:
          name: name of the program, for `wait`.
          lower: returns the program lowered for the shapes, dtypes and shardings of its arguments.
        """
        job: futures.Future[None] = futures.Future()
        self._jobs[name] = job
        threading.Thread(target=self._compile, args=(job, lower), name=f"compile {name}").start()

    def _compile(self, job: futures.Future[None], lower: Callable[[], Any]) -> None:
        with self._gate, contextlib.suppress(Exception):  # the call itself reports what is wrong
            if not self._closed:
                lower().compile()
        job.set_result(None)

    def wait(self, name: str, check: Callable[[], None] = lambda: None, say: Callable[[str], None] = print) -> None:
        """Wait until a program is compiled; return immediately if its compilation was never started.

        Args:
          name: name of the program.
          check: called repeatedly; it may raise.
          say: receives a line if there is something to wait for.
        """
        job = self._jobs.pop(name, None)
        if job is None or job.done():
            return
        say(f"compiling: {name}")
        start = time.monotonic()
        while not futures.wait([job], timeout=_PATIENCE).done:
            check()
        self.waited += time.monotonic() - start
