"""Progress reports on stderr for work that takes over five seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

#: Nothing is printed before this many seconds, so that short work is silent.
QUIET_SECONDS = 5.0
#: Seconds between two prints on a terminal (one line, overwritten) and elsewhere (one line each).
TTY_SECONDS, LOG_SECONDS = 2.0, 10.0


class Progress:
    """Prints phase, done / total, rate and remaining time: `collect 512/2,048 users  25%  103.1/s  15 s left`.

    Rate and remaining time exclude the units of the first update, whose time is mostly compilation.

    Args:
      phase: name of the work.
      total: number of units; with None no remaining time is printed.
      unit: name of a unit.
      done: units done before, for example before a restart; they do not count towards the rate.
      stream: stderr by default.
      clock: returns monotonic seconds.
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
        """Set the total number of units done; print if a print is due."""
        global _moves
        _moves += 1
        self._done = done
        now = self._clock()
        self._base = self._base or (now, done)
        every = TTY_SECONDS if self._tty else LOG_SECONDS
        due = self._started + QUIET_SECONDS if self._printed is None else self._printed + every
        if now >= due:
            self._print(now, final=False)

    def close(self) -> None:
        """Print the final line, if the work took at least `QUIET_SECONDS` or anything was printed."""
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
        if final and not rate:  # the first update completed all units
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
_moves = 0


def _check() -> None:
    return None


def mute() -> None:
    """Silence this process from now on, when another process prints for all."""
    global _muted
    _muted = True


def moves() -> int:
    """Return how many phases and updates of progress this process has seen: it grows while work is done."""
    return _moves


@contextlib.contextmanager
def interruptible(check: Callable[[], None]) -> Iterator[None]:
    """Return a context in which `check` runs at each `phase` and on progress of `counted` work; it may raise."""
    global _check
    before, _check = _check, check
    try:
        yield
    finally:
        _check = before


def check_interrupted() -> None:
    """Call the function passed to `interruptible`."""
    _check()


def _unobserved(name: str) -> None:
    """Ignore phases."""


_begun: Callable[[str], None] = _unobserved


@contextlib.contextmanager
def observed(begun: Callable[[str], None]) -> Iterator[None]:
    """Return a context in which `begun` receives the name of each `phase` that begins."""
    global _begun
    before, _begun = _begun, begun
    try:
        yield
    finally:
        _begun = before


def say(line: str) -> None:
    """Print a line on stderr."""
    if not _muted:
        print(line, file=sys.stderr, flush=True)


def phase(name: str) -> None:
    """Announce the phase that begins; `Progress` prints only for long work."""
    global _moves
    _moves += 1
    say(f"phase: {name}")
    _begun(name)
    _check()


#: A function such as `counted`: (name, total) -> a callback that receives the units done.
Counter = Callable[..., Callable[[int], None]]


def counted(name: str, total: int, checks: int | None = None, done: int = 0) -> Callable[[int], None]:
    """Return a callback (units done) that prints progress with the remaining time, and a last line at the end.

    Args:
      name: name of the work.
      total: number of units.
      checks: number of calls of the `interruptible` function, at equal shares of the total; None calls it at every
        update. Processes with different shares of some work need a number, because all must call it equally often.
      done: units done before, for example before a restart.
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
