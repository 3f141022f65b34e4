"""Progress of anything that takes over five seconds, on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

#: Nothing is printed before this many seconds, so that short work is silent.
QUIET_SECONDS = 5.0
#: Seconds between two prints on a terminal (one line, overwritten) and elsewhere (a line each).
TTY_SECONDS, LOG_SECONDS = 2.0, 10.0


class Progress:
    """Prints phase, done / total, rate and time left: `collect 512/2,048 users  25%  103.1/s  15 s left`.

    Rate and time left are those of the units after the first update, whose time is mostly compilation.

    Args:
      phase: what is being done.
      total: units to do; None where it is not known, then no time left is printed.
      unit: name of a unit.
      done: units done before, as after a restart; they do not count towards the rate.
      stream: stderr by default.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        phase: str,
        total: int | None,
        unit: str = "steps",
        done: int = 0,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._phase, self._total, self._unit = phase, total, unit
        self._first = self._done = done
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started = clock()
        self._printed: float | None = None
        self._base: tuple[float, int] | None = None  # time and units done at the first update
        self._tty = self._stream.isatty()

    def update(self, done: int) -> None:
        """Says how many units are done in all; prints if it is time to."""
        self._done = done
        now = self._clock()
        self._base = self._base or (now, done)
        every = TTY_SECONDS if self._tty else LOG_SECONDS
        due = self._started + QUIET_SECONDS if self._printed is None else self._printed + every
        if now >= due:
            self._print(now, final=False)

    def close(self) -> None:
        """Prints the final line, if the work took long enough to be spoken of."""
        now = self._clock()
        if self._printed is not None or now - self._started >= QUIET_SECONDS:
            self._print(now, final=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, now: float, final: bool) -> None:
        if _muted:
            return
        self._printed = now
        elapsed = max(now - self._started, 1e-9)
        since, before = self._base or (self._started, self._first)
        rate = (self._done - before) / (now - since) if now > since and self._done > before else 0.0
        if final and not rate:  # all was done by the first update
            rate = (self._done - self._first) / elapsed
        line = f"{self._phase} {self._done:,}" + (f"/{self._total:,}" if self._total else "") + f" {self._unit}"
        line += f"  {self._done / self._total:.0%}" if self._total else ""
        line += f"  {rate:,.1f}/s" if rate else ""
        if final:
            line += f"  took {_duration(elapsed)}"
        elif self._total and rate:
            line += f"  {_duration((self._total - self._done) / rate)} left"
        line = f"\r{line:<79}" if self._tty else line
        self._stream.write(line + ("\n" if final or not self._tty else ""))
        self._stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


_muted = False


def _check() -> None:
    return None


def mute() -> None:
    """Lets this process be silent from now on, where another speaks for all."""
    global _muted
    _muted = True


@contextlib.contextmanager
def interruptible(check: Callable[[], None]) -> Iterator[None]:
    """Within it `check` is called at each `phase` and as anything `counted` goes on; it may raise."""
    global _check
    before, _check = _check, check
    try:
        yield
    finally:
        _check = before


def check() -> None:
    """Calls what `interruptible` was given."""
    _check()


def _unobserved(name: str) -> None:
    """Nobody observes phases."""


_begun: Callable[[str], None] = _unobserved


@contextlib.contextmanager
def observed(begun: Callable[[str], None]) -> Iterator[None]:
    """Within it `begun` is called with the name of each `phase` that begins."""
    global _begun
    before, _begun = _begun, begun
    try:
        yield
    finally:
        _begun = before


def say(line: str) -> None:
    """A line on stderr."""
    if not _muted:
        print(line, file=sys.stderr, flush=True)


def phase(name: str) -> None:
    """Says which phase begins; `Progress` speaks only of what takes long."""
    say(f"phase: {name}")
    _begun(name)
    _check()


def counted(name: str, total: int, checks: int | None = None, done: int = 0) -> Callable[[int], None]:
    """A callback (units done) that prints progress with the time left, and a last line when all is done.

    Args:
      checks: how often what `interruptible` was given is called, at equal shares of the total; None for every update.
        Processes that do different shares of some work need a number, for they must all ask as often.
      done: units done before, as after a restart.
    """
    bar = Progress(name, total, unit="users" if name in ("collect", "ab_test") else "steps", done=done)
    checked = 0

    def update(done: int) -> None:
        nonlocal checked
        bar.update(done)
        if done >= total:
            bar.close()
        due = checked + 1
        if checks is not None:
            due = checks if done >= total else checks * done // total
        for _ in range(checked, due):
            checked += 1
            _check()

    return update
