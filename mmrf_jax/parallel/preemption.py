"""Being told to stop: SIGTERM to any process of a run, seen by all of them at the same place of the program."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # of a run that saved its state because it was told to stop; start it again (EX_TEMPFAIL)


class Preempted(Exception):
    """The run was told to stop; whoever holds what it needs to go on saves that as this passes."""


class Watch:
    """Asked again and again by every process, at the same places: the answer is the same everywhere.

    With several processes JAX agrees on the next place that none of them has passed yet.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._told = False

    def told(self, *_: object) -> None:
        """Handles SIGTERM."""
        self._told = True

    def check(self) -> None:
        """Asks whether to stop here.

        Raises:
          Preempted: if so.
        """
        self._asked += 1
        if jax.process_count() > 1:
            self._told = self._told or multihost_utils.reached_preemption_sync_point(self._asked)
        if self._told:
            raise Preempted("told to stop by SIGTERM")


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """A `Watch` that SIGTERM tells; with several processes JAX's own service is told."""
    watch = Watch()
    ours = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, watch.told) if ours else None
    try:
        yield watch
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)
