"""On-demand `jax.profiler` traces of a run's steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax


def parse(steps: str) -> tuple[int, int] | None:
    """Parse "100:110" into the first and last step, counted from 1; return None for "".

    Raises:
      ValueError: for any other text.
    """
    if not steps:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", steps)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"config.profile_steps={steps!r} names no steps; use FIRST:LAST, such as 100:110")
    return int(found[1]), int(found[2])


class Profile:
    """Writes a trace of some steps to a folder, for TensorBoard or Perfetto.

    Args:
      steps: text for `parse`.
      folder: folder of the traces; None writes nothing.
    """

    def __init__(self, steps: str, folder: Path | None):
        self._steps = None if folder is None else parse(steps)
        self._folder, self._on = folder, False

    def before(self, step: int) -> None:
        """Start the trace if needed; call this before each step, counted from 1."""
        if self._steps is not None and self._steps[0] <= step <= self._steps[1] and not self._on:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, result: Any) -> None:
        """End the trace after its last step; call this after each step with its result, which is waited for."""
        if self._on and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """End a trace that is still running, if training ends before the last requested step."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
