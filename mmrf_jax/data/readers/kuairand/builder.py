"""KuaiRand-Pure, -1K and -27K as a prepared log: sessions on disk, items, ids and a report.

    log = open_or_prepare(kuairand_dir, cache)  # prepares once; later calls find it
    train = log.part("train")

Parts: `train`, `valid`, `test` are sessions of the standard log by date, ordered by user and time; `random_train`,
`random_valid` and `random_test` are the random exposures of their days.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmrf_jax import types
from mmrf_jax.data import records
from mmrf_jax.data.readers.engine import tasks
from mmrf_jax.data.readers.engine.tasks import Engine
from mmrf_jax.data.readers.kuairand import prepare, release
from mmrf_jax.data.readers.kuairand.config import KuaiRandConfig
from mmrf_jax.data.readers.kuairand.features import read_catalogue
from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.data.splits import PARTS
from mmrf_jax.io import copies, storage
from mmrf_jax.io.progress import Counter, counted, say

#: Reports progress without checking for a stop: a single process prepares, but all must check equally often.
unchecked = functools.partial(counted, checks=0)


@dataclasses.dataclass(frozen=True)
class KuaiRand:
    """A prepared log of KuaiRand (Gao et al., CIKM 2022).

    Attributes:
      spec: sizes and signals of the sessions.
      items: the item table, read-only memory maps; row 0 is an unknown video.
      item_ids: [V] KuaiRand's ids, −1 for row 0.
      vocabularies: {"author", "tag": KuaiRand's ids of rows 1, 2, …}.
      parts: {part: blocks of sessions on disk}.
      report: rows read, left out and used.
      folder: where it is.
      user_ids: None, for `user_id` is KuaiRand's.
      encoders: none by name.
    """

    spec: InputSpec
    items: types.Items
    item_ids: np.ndarray
    vocabularies: Mapping[str, np.ndarray]
    parts: Mapping[str, records.Blocks]
    report: Mapping[str, Any]
    folder: pathlib.Path
    user_ids: None = None
    encoders: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | os.PathLike, config: KuaiRandConfig | None = None) -> KuaiRand:
        """Open a prepared log.

        Args:
          folder: what `prepare_log` made.
          config: that it must have; None for any.

        Raises:
          FileNotFoundError: if nothing was prepared, or preparation is unfinished.
          ValueError: for a log of another format or config.
        """
        here = copies.local(storage.path(folder))
        if not (here / prepare.ABOUT).exists():
            raise FileNotFoundError(f"{folder} holds no prepared KuaiRand; prepare it or name the folder of the log")
        about = json.loads((here / prepare.ABOUT).read_text())
        if about["format"] != prepare.FORMAT:
            raise ValueError(
                f"{folder} has format {about['format']}, this code reads {prepare.FORMAT}; prepare the CSV files in "
                "another folder"
            )
        if config is not None and about["config"] != dataclasses.asdict(config):
            asked = dataclasses.asdict(config)
            differing = [f"{name} {value}" for name, value in about["config"].items() if value != asked.get(name)]
            raise ValueError(
                f"{folder} was prepared with other settings ({', '.join(differing)}); prepare the CSV files in another "
                "folder"
            )
        catalogue = read_catalogue(here / "catalogue")
        parts = {name: records.Blocks(here / name) for name in PARTS}
        return cls(
            spec=parts["train"].spec,
            items=catalogue.items,
            item_ids=catalogue.video_id,
            vocabularies={name: catalogue.fitted[f"{name}_vocabulary"] for name in ("author", "tag")},
            parts=parts,
            report=about["report"],
            folder=here,
        )

    def part(self, name: str) -> Sessions:
        """Return all sessions of a part."""
        return self.parts[name].read(np.arange(len(self.parts[name].sessions)))


def prepare_log(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    config: KuaiRandConfig | None = None,
    engine: Engine | None = None,
    progress: Counter = unchecked,
) -> KuaiRand:
    """Prepare KuaiRand's files in a new folder, which appears complete or not at all, or open what is there.

    Concurrent processes wait for each other; the first does all the work. After a stop, the same call goes on.

    Args:
      source: folder of the official CSV files, or the parent folder of their `data`.
      folder: to write.
      config: see `KuaiRandConfig`.
      engine: runs the tasks; `tasks.worker_processes()` by default.
      progress: as `io.progress.counted`, which also checks for a stop; the default does not check.

    Raises:
      FileExistsError: if the folder holds something else.
      ValueError: if it holds a log of another format or config.
      FileNotFoundError, ValueError: as `release.find_release` and `prepare.run_stages`.
    """
    config, folder = config or KuaiRandConfig(), storage.path(folder).absolute()
    if folder.exists() and not (folder / prepare.ABOUT).exists():
        raise FileExistsError(f"{folder} exists and holds no prepared KuaiRand; name a folder that does not exist")
    if not folder.exists():
        found = release.find_release(os.path.abspath(copies.local(storage.path(source))))  # tasks may run elsewhere

        def run(work: pathlib.Path, engine: Engine) -> pathlib.Path:
            made = prepare.run_stages(prepare.KuaiRandJob(found, config, work), engine, progress)
            _say_unused(json.loads((made / prepare.ABOUT).read_text())["report"])
            return made

        with copies.built(folder.parent, folder.name) as parent:
            tasks.make_folder(parent / folder.name, _key(found, config), engine, run)
    return KuaiRand.open(folder, config)


def open_or_prepare(
    source: str | os.PathLike,
    cache_dir: str | os.PathLike,
    config: KuaiRandConfig | None = None,
    engine: Engine | None = None,
    progress: Counter = unchecked,
) -> KuaiRand:
    """Open the log of some files; prepare it unless an earlier call did so for the same files, config and format.

    `source` is the folder of the official files, or one that `prepare_log` wrote with the same config. Files are the
    same if their names, sizes and modification times are. Other arguments and errors are those of `prepare_log`.
    """
    config, source = config or KuaiRandConfig(), copies.local(storage.path(source))
    if (source / prepare.ABOUT).exists():
        return KuaiRand.open(source, config)
    key = _key(release.find_release(source), config)
    return prepare_log(source, storage.path(cache_dir) / key, config, engine, progress)


def _key(source: release.Release, config: KuaiRandConfig) -> str:
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    said = json.dumps([prepare.FORMAT, records.VERSION, dataclasses.asdict(config), stats], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _say_unused(report: dict) -> None:
    for name, counts in report["log"].items():
        if counts["used"] < counts["rows"]:
            unused = f"{counts['rows'] - counts['used']:,} of {counts['rows']:,} rows"
            say(f"{unused} of the {name} log are not used: {prepare.describe_unused(counts)}")
    for name, counts in report["features"].items():
        if counts["unparsable"]:
            unused = f"{counts['unparsable']:,} of {counts['rows']:,} rows"
            say(f"{unused} of the features of {name} are not used: unparsable")
