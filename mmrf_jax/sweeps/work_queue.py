"""A work queue in a shared folder: tasks that processes on any machines claim, each done by one process at a time.

A process claims a task by a lock (`io.files.held`), which ends with it: the task of a killed process is free, and the
next process that looks takes it over. Nothing else is agreed on, so processes may start and end at any time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmrf_jax.io import files


class Task(NamedTuple):
    """A piece of work.

    Attributes:
      claim: the folder that is locked while a process does it.
      run: does it, resuming what an earlier process has left; if nothing is left to do, it only finds that out.
      after: numbers of the tasks that must be done before.
      more: further folders that are locked, of a task that is one for several.
    """

    claim: Path
    run: Callable[[], Any]
    after: frozenset[int] = frozenset()
    more: tuple[Path, ...] = ()


def claim(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Claim a task by its folder until the stack closes, and return whether it was free."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(files.held(folder))
    except ValueError:
        return False
    return True


def work(tasks: Sequence[Task]) -> int:
    """Work on tasks, in order, until each is done or with another process; return how many others still work on.

    The process that does the last task finds all others done and returns 0; so may more of them.
    """
    left = dict(enumerate(tasks))
    while left:
        before = len(left)
        for number, task in list(left.items()):
            if not task.after.isdisjoint(left):
                continue
            with contextlib.ExitStack() as stack:
                if all(claim(folder, stack) for folder in (task.claim, *task.more)):
                    task.run()
                    del left[number]
        if len(left) == before:
            break
    return len(left)
