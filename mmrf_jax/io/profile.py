"""Traces of a run's steps by `jax.profiler`, on demand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax


def parse(steps: str) -> tuple[int, int] | None:
    """The first and last step of "100:110", counted from 1; None of "".

    Raises:
      ValueError: for anything else.
    """
    if not steps:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", steps)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"config.profile_steps={steps!r} names no steps; use FIRST:LAST, such as 100:110")
    return int(found[1]), int(found[2])


class Profile:
    """Writes a trace of some steps into a folder, for TensorBoard or Perfetto.

    Args:
      steps: as given to `parse`. folder: where traces go; None writes nothing.
    """

    def __init__(self, steps: str, folder: Path | None):
        self._steps = None if folder is None else parse(steps)
        self._folder, self._on = folder, False

    def before(self, step: int) -> None:
        """Called before a step, counted from 1."""
        if self._steps is not None and self._steps[0] <= step <= self._steps[1] and not self._on:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, result: Any) -> None:
        """Called after it, with what it gives: the last step is waited for."""
        if self._on and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends the trace where the steps end before the last that was asked for."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
