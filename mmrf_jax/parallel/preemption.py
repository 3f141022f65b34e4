"""Preemption by SIGTERM or SIGINT to any process of a run; all processes stop at the same point.

The first signal stops a run at a point where nothing is lost, or immediately if it has nothing to lose. The second ends
the process immediately. A thread listens for signals, because Python's own handlers wait until a compilation ends.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from mmrf_jax.parallel import multihost
from mmrf_jax.parallel.ending import end_by

EXIT_CODE = 75  # of a run that saved its state after a stop signal; start it again (EX_TEMPFAIL)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGAIN_SECONDS = 0.1
_watch: Watch | None = None  # of this process


class Preempted(BaseException):
    """The run received a stop signal; callers that own resumable state save it as this exception passes.

    Like KeyboardInterrupt it does not derive from Exception: handlers of any error must let it pass.
    """

    def __init__(self, number: signal.Signals):
        super().__init__(f"asked to stop by {number.name}")
        self.number = number


class Watch:
    """Polls for a stop signal; every process polls at the same points and gets the same answer.

    With several processes JAX agrees on the next point that none of them has passed yet.
    """

    def __init__(self, several: bool, at_once: bool) -> None:
        self.several, self._at_once = several, at_once
        self._asked = 0
        self._told: signal.Signals | None = None

    def request_stop(self, number: int, _: object = None) -> None:
        """Handle a signal, in the main thread."""
        first, self._told = self._told is None, self._told or signal.Signals(number)
        if first and self._at_once and not self.several:
            raise Preempted(self._told)

    def again(self, *_: object) -> None:
        """Handle SIGALRM: raise again an error that was lost the first time."""
        if self._at_once and self._told and not self.several:
            raise Preempted(self._told)

    def lost(self, hook: Callable[[Any], object], unraisable: Any) -> None:
        """Act as a `sys.unraisablehook` in front of another: raise later what a Python callback cannot raise.

        Such callbacks include those of the garbage collector.
        """
        if isinstance(unraisable.exc_value, Preempted):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            hook(unraisable)

    def check(self) -> None:
        """Check whether to stop here.

        Raises:
          Preempted: if so.
        """
        self._asked += 1
        if self.several and multihost_utils.reached_preemption_sync_point(self._asked):
            self._told = self._told or signal.SIGTERM
        elif self.several:
            return  # a signal to this process alone: the others do not know of it yet
        if self._told:
            raise Preempted(self._told)

    def alone(self) -> None:
        """Detach this process: from now on it stops without the others, which it has left."""
        if self.several and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.request_stop)
        self.several = False

    @contextlib.contextmanager
    def stopping(self, at_once: bool) -> Iterator[Watch]:
        """Return a context in which a signal raises `Preempted` anywhere, or only in `check`."""
        before, self._at_once = self._at_once, at_once
        if at_once and self._told and not self.several:
            raise Preempted(self._told)
        try:
            yield self
        finally:
            self._at_once = before


@contextlib.contextmanager
def watching(at_once: bool = False) -> Iterator[Watch]:
    """Return a context with a `Watch` for SIGTERM and SIGINT; with several processes it notifies JAX's own service.

    A signal that was ignored before stays ignored, as in `nohup` and in background jobs. Nested calls share one watch.
    Only the main thread can watch; in other threads no signal is seen.

    Args:
      at_once: whether a signal raises `Preempted` anywhere, for programs that have nothing to save; otherwise only
        `Watch.check` raises it. With several processes only `Watch.check` does.
    """
    global _watch
    if _watch is not None:
        with _watch.stopping(at_once):
            yield _watch
        return
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    watch = Watch(several, at_once)
    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    # JAX's service handles SIGTERM itself, so with several processes it receives SIGINT as SIGTERM.
    heard = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN and not (several and n == signal.SIGTERM)]
    before: dict[int, Any] = {number: signal.signal(number, watch.request_stop) for number in heard}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, watch.again)
    hook, sys.unraisablehook = sys.unraisablehook, functools.partial(watch.lost, sys.unraisablehook)
    read, write = os.pipe()
    os.set_blocking(write, False)
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(read, watch), name="signals", daemon=True).start()
    _watch = watch
    try:
        yield watch
    finally:
        _watch, sys.unraisablehook = None, hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(wakeup)
        os.close(write)
        for number, handler in before.items():
            signal.signal(number, handler)


def part() -> None:
    """Leave the run, so that this process continues and ends alone; all must call it, and no collective may follow."""
    if jax.process_count() > 1:
        multihost.leave()
        jax.distributed.shutdown()
    if _watch is not None:
        _watch.alone()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Return a context in which a watched signal raises `Preempted` anywhere in the program."""
    with contextlib.nullcontext() if _watch is None else _watch.stopping(at_once=True):
        yield


def _listen(read: int, watch: Watch) -> None:
    """Read signals as they arrive, until the other end of the pipe is closed."""
    asked = False
    with open(read, "rb", buffering=0) as coming:
        while byte := coming.read(1):
            if byte[0] not in _SIGNALS:
                continue
            if asked:
                end_by(byte[0])
            asked = True
            if watch.several:
                os.kill(os.getpid(), signal.SIGTERM)
            with contextlib.suppress(OSError):
                name = signal.Signals(byte[0]).name
                print(f"{name}: stopping; a second one ends at once", file=sys.stderr, flush=True)
