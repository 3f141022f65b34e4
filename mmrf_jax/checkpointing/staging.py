"""Checkpoints in object storage for which orbax has no driver: written on this machine, then copied in the background.

A step in object storage has the same files as one on a disk. `COMMIT` is copied last and deleted first, so only a
complete step has it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mmrf_jax.io import copies
from mmrf_jax.io.storage import RemotePath

#: The file that says that a step is complete; orbax writes it.
COMMIT = "commit_success.txt"
_AT_ONCE = 8  # files


class Staging:
    """The steps of a run in object storage, and their copies on this machine.

    Args:
      target: folder of the steps in object storage.
      read_only: whether nothing is written.
    """

    def __init__(self, target: RemotePath, read_only: bool):
        self._target = target
        self._pushing: Future | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint-copy")
        if read_only:
            self.folder = copies.scratch("checkpoints")
            return
        shutil.rmtree(copies.cache("checkpoints", target))  # of a killed process
        self.folder = copies.cache("checkpoints", target)
        for name in target.names():
            if name.isdecimal() and not (target / name / COMMIT).exists():
                (target / name).remove()

    def steps(self) -> list[int]:
        """Return the complete steps, in order."""
        names = [name for name in self._target.names() if name.isdecimal()]
        return sorted(int(name) for name in names if (self._target / name / COMMIT).exists())

    def push(self, step: int, written: Callable[[], None]) -> None:
        """Copy a step in the background.

        Args:
          written: returns when the step is complete on this machine.
        """

        def run() -> None:
            written()
            source, target = self.folder / str(step), self._target / str(step)
            files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(
                    pool.map(lambda name: (target / name).upload(source / name), [f for f in files if str(f) != COMMIT])
                )
            (target / COMMIT).upload(source / COMMIT)

        self._pushing = self._thread.submit(run)

    def wait(self) -> None:
        """Wait until the step is copied; raise what went wrong."""
        if self._pushing is not None:
            pushing, self._pushing = self._pushing, None
            pushing.result()

    def pushing(self) -> bool:
        """Return whether a step is being copied."""
        return self._pushing is not None and not self._pushing.done()

    def fetch(self, step: int) -> Path:
        """Return a copy of a step on this machine."""
        return copies.local(self._target / str(step))  # type: ignore[arg-type]

    def delete(self, step: int) -> None:
        """Delete a step."""
        (self._target / str(step) / COMMIT).unlink(missing_ok=True)
        (self._target / str(step)).remove()

    def close(self) -> None:
        self._thread.shutdown()
