"""What to prepare and where: the config, and the work folder in which tasks leave their files for each other."""

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
#: Random exposures of the days of each split of the standard log.
RANDOM_SPLITS = {"random_train": "train", "random_valid": "valid", "random_test": "test"}


@dataclasses.dataclass(frozen=True)
class Job:
    """What to prepare and where; it travels to the processes that run tasks.

    Attributes:
      source: the official files. config: see there.
      work: folder of everything that is made, the same for all processes.
      chunk_bytes: of the chunk of files that a task reads. bucket_rows: of the users whom a task makes sessions of.
        They say how much memory a task takes, and where blocks of sessions end.
    """

    source: columns.Source
    config: KuaiRandConfig
    work: pathlib.Path
    chunk_bytes: int = 64 << 20
    bucket_rows: int = 1_000_000

    @property
    def records(self) -> pathlib.Path:
        """Folder of all that is kept."""
        return self.work / "records"

    @property
    def session_gap_minutes(self) -> float:
        return self.config.session_gap_minutes or SESSION_GAP_MINUTES[self.source.variant]

    def path(self, stage: str, task: int, suffix: str = "arrow") -> pathlib.Path:
        """What a task of a stage makes."""
        return self.work / stage / f"{task:06d}.{suffix}"

    def made(self, stage: str, suffix: str = "arrow") -> list[pathlib.Path]:
        """What all tasks of a stage made, in their order."""
        return sorted((self.work / stage).glob(f"*.{suffix}"))

    def read(self, name: str) -> Any:
        """A JSON file of the work folder."""
        return json.loads((self.work / name).read_text())

    def read_all(self, stage: str) -> list[Any]:
        """The JSON files that all tasks of a stage made."""
        return [json.loads(path.read_text()) for path in self.made(stage, "json")]


@contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path beside `path` to write to, renamed to it at the end; two writers do not disturb each other."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    yield temporary
    temporary.rename(path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """A JSON file that appears whole."""
    with appearing(path) as temporary:
        temporary.write_text(json.dumps(value))


def save_array(path: pathlib.Path, value: np.ndarray) -> None:
    """An npy file that appears whole; `path` ends in .npy."""
    with appearing(path) as temporary, open(temporary, "wb") as f:
        np.save(f, value)


Task = Callable[[Job, int], None]
#: Runs a task for each of some numbers, in any order; `done` is told how many have ended.
Engine = Callable[[Task, Job, Sequence[int], Callable[[int], None]], None]
