"""Being told to stop, by SIGTERM or SIGINT to any process of a run: seen by all of them at the same place.

The first signal stops a run where nothing is lost, or at once where it has nothing to lose; the second ends the process
at once, whatever it does. A thread listens for them, because Python's own handlers wait until a compilation ends.
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

from mmrf_jax.parallel.ending import end_by

EXIT_CODE = 75  # of a run that saved its state because it was told to stop; start it again (EX_TEMPFAIL)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGAIN_SECONDS = 0.1
_watch: Watch | None = None  # of this process


class Preempted(BaseException):
    """The run was told to stop; whoever holds what it needs to go on saves that as this passes.

    As KeyboardInterrupt it is no Exception: what handles any error must let it pass.
    """

    def __init__(self, number: signal.Signals):
        super().__init__(f"told to stop by {number.name}")
        self.number = number


class Watch:
    """Asked again and again by every process, at the same places: the answer is the same everywhere.

    With several processes JAX agrees on the next place that none of them has passed yet.
    """

    def __init__(self, several: bool, at_once: bool) -> None:
        self.several, self._at_once = several, at_once
        self._asked = 0
        self._told: signal.Signals | None = None

    def told(self, number: int, _: object = None) -> None:
        """Handles a signal, in the main thread."""
        first, self._told = self._told is None, self._told or signal.Signals(number)
        if first and self._at_once and not self.several:
            raise Preempted(self._told)

    def again(self, *_: object) -> None:
        """Handles SIGALRM: what was raised first got lost."""
        if self._at_once and self._told and not self.several:
            raise Preempted(self._told)

    def lost(self, hook: Callable[[Any], object], unraisable: Any) -> None:
        """A `sys.unraisablehook`, before another: an error that callbacks of Python's own cannot raise, as of its
        garbage collection, is raised a little later."""
        if isinstance(unraisable.exc_value, Preempted):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            hook(unraisable)

    def check(self) -> None:
        """Asks whether to stop here.

        Raises:
          Preempted: if so.
        """
        self._asked += 1
        if self.several and multihost_utils.reached_preemption_sync_point(self._asked):
            self._told = self._told or signal.SIGTERM
        elif self.several:
            return  # a signal of this process alone: the others do not know of it yet
        if self._told:
            raise Preempted(self._told)

    def alone(self) -> None:
        """From here on this process stops without the others, which it has parted from."""
        if self.several and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.told)
        self.several = False

    @contextlib.contextmanager
    def stopping(self, at_once: bool) -> Iterator[Watch]:
        """Within it a signal raises `Preempted` wherever the program is, or only where it asks."""
        before, self._at_once = self._at_once, at_once
        if at_once and self._told and not self.several:
            raise Preempted(self._told)
        try:
            yield self
        finally:
            self._at_once = before


@contextlib.contextmanager
def watching(at_once: bool = False) -> Iterator[Watch]:
    """A `Watch` that SIGTERM and SIGINT tell; with several processes JAX's own service is told of them.

    A signal that was ignored before stays so, as in `nohup` and in jobs in the background. Within another `watching` it
    is the same watch. Only the main thread can watch; elsewhere nobody is told.

    Args:
      at_once: whether a signal raises `Preempted` wherever the program is, for what has nothing to save; else only
        `Watch.check` does. With several processes it does only there.
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
    # JAX's service has a handler of its own for SIGTERM, so of several processes it gets SIGINT as SIGTERM.
    heard = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN and not (several and n == signal.SIGTERM)]
    before: dict[int, Any] = {number: signal.signal(number, watch.told) for number in heard}
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
    """Lets this process go on, and end, without the others of the run; all must call it, and no more work together."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()
    if _watch is not None:
        _watch.alone()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Within it a signal that is watched for raises `Preempted` wherever the program is."""
    with contextlib.nullcontext() if _watch is None else _watch.stopping(at_once=True):
        yield


def _listen(read: int, watch: Watch) -> None:
    """Hears the signals as they come, until the other end of the pipe is closed."""
    told = False
    with open(read, "rb", buffering=0) as coming:
        while byte := coming.read(1):
            if byte[0] not in _SIGNALS:
                continue
            if told:
                end_by(byte[0])
            told = True
            if watch.several:
                os.kill(os.getpid(), signal.SIGTERM)
            with contextlib.suppress(OSError):
                name = signal.Signals(byte[0]).name
                print(f"{name}: stopping; a second one ends at once", file=sys.stderr, flush=True)
