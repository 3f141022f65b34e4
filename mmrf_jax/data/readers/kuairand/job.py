"""What to prepare of KuaiRand, and where."""

from __future__ import annotations

import dataclasses
import pathlib

from mmrf_jax.data.readers.engine import tasks
from mmrf_jax.data.readers.kuairand import csv_files
from mmrf_jax.data.readers.kuairand.config import SESSION_GAP_MINUTES, KuaiRandConfig


@dataclasses.dataclass(frozen=True)
class Job(tasks.Job):
    """The files and the config of a preparation.

    Attributes:
      source: the official files.
      config: see `KuaiRandConfig`.
      work: folder of all outputs, the same for all processes.
      chunk_bytes: size of the chunk of files that a task reads.
      bucket_rows: number of rows of the users in one task's sessions. Both sizes determine the memory of a task, and
        where blocks of sessions end.
    """

    source: csv_files.Source
    config: KuaiRandConfig
    work: pathlib.Path
    chunk_bytes: int = 64 << 20
    bucket_rows: int = 1_000_000

    @property
    def records(self) -> pathlib.Path:
        """Return the folder of all permanent outputs."""
        return self.work / "records"

    @property
    def session_gap_minutes(self) -> float:
        return self.config.session_gap_minutes or SESSION_GAP_MINUTES[self.source.variant]
