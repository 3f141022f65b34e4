"""Wall time of a run by activity."""

from __future__ import annotations

import time
from collections.abc import Callable

from mmrf_jax.parallel import programs

#: Phase -> reported activity; phases that are not listed count as "evaluating".
_KINDS = {"prepare": "preparing", "read": "collecting", "collect": "collecting", "fit": "fitting", "train": "training"}


class Times:
    """Wall time in seconds since construction, by activity, with compilation separate.

    Args:
      ahead: background compiler; time spent waiting for it counts as compilation.
      clock: monotonic clock in seconds.
    """

    def __init__(self, ahead: programs.Ahead, clock: Callable[[], float] = time.monotonic):
        self._compiling = programs.CompileClock()
        self._ahead, self._clock = ahead, clock
        self._kind, self._since = "preparing", self._now()
        self._spent = dict.fromkeys([*_KINDS.values(), "evaluating"], 0.0)

    def __enter__(self) -> Times:
        return self

    def __exit__(self, *_: object) -> None:
        self._compiling.close()

    def begin(self, phase: str) -> None:
        """Start a phase; time from now on is attributed to it."""
        now = self._now()
        self._spent[self._kind] += (now[0] - self._since[0]) - (now[1] - self._since[1])
        self._kind, self._since = _KINDS.get(phase, "evaluating"), now

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far: "compiling", "preparing", "collecting", "fitting", "training" and "evaluating"."""
        self.begin("results")
        return {"compiling": self._now()[1], **self._spent}

    def _now(self) -> tuple[float, float]:
        """Return the clock in seconds, and how many of them the run has waited for compilation."""
        return self._clock(), self._compiling.seconds + self._ahead.waited


def describe(seconds: dict[str, float]) -> str:
    """Return the times as one line of text."""
    total = sum(seconds.values())
    return f"time: {total:.0f} s, of which " + ", ".join(f"{kind} {value:.0f}" for kind, value in seconds.items())
