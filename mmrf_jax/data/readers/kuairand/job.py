"""A preparation job: config, and the work folder through which tasks exchange files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mmrf_jax.data.readers.kuairand import columns
from mmrf_jax.data.readers.kuairand.config import KuaiRandConfig

SESSION_GAP_MINUTES = {"pure": 24 * 60, "1k": 30, "27k": 30}
#: Splits of random exposures, by the split of the standard log with the same days.
RANDOM_SPLITS = {"random_train": "train", "random_valid": "valid", "random_test": "test"}


@dataclasses.dataclass(frozen=True)
class Job:
    """What to prepare and where; sent to the processes that run tasks.

    Attributes:
      source: the official files.
      config: see `KuaiRandConfig`.
      work: folder of all outputs, the same for all processes.
      chunk_bytes: size of the chunk of files that a task reads.
      bucket_rows: number of rows of the users in one task's sessions. Both sizes determine the memory of a task, and
        where blocks of sessions end.
    """

    source: columns.Source
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

    def path(self, stage: str, task: int, suffix: str = "arrow") -> pathlib.Path:
        """Return the path of a task's output in a stage."""
        return self.work / stage / f"{task:06d}.{suffix}"

    def made(self, stage: str, suffix: str = "arrow") -> list[pathlib.Path]:
        """Return the outputs of all tasks of a stage, in order."""
        return sorted((self.work / stage).glob(f"*.{suffix}"))

    def read(self, name: str) -> Any:
        """Read a JSON file of the work folder."""
        return json.loads((self.work / name).read_text())

    def read_all(self, stage: str) -> list[Any]:
        """Read the JSON files of all tasks of a stage."""
        return [json.loads(path.read_text()) for path in self.made(stage, "json")]


@contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path in the folder of `path`, renamed to it at the end; concurrent writers do not interfere."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    yield temporary
    temporary.rename(path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with appearing(path) as temporary:
        temporary.write_text(json.dumps(value))


def save_array(path: pathlib.Path, value: np.ndarray) -> None:
    """Write an npy file atomically; `path` ends in .npy."""
    with appearing(path) as temporary, open(temporary, "wb") as f:
        np.save(f, value)


Task = Callable[[Job, int], None]
#: Runs a task for each of some numbers, in any order; `done` receives how many have ended.
Engine = Callable[[Task, Job, Sequence[int], Callable[[int], None]], None]
