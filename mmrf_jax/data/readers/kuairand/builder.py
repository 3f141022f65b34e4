"""A TFDS builder that converts the CSV files of KuaiRand-Pure, -1K and -27K to session logs, without TensorFlow.

    builder = KuaiRand(data_dir=cache, source=kuairand_dir, config=KuaiRandConfig())
    builder.download_and_prepare()  # downloads nothing; a second call does nothing
    splits, items, spec, report = load(builder)

Splits: `train`, `valid`, `test` are sessions of the standard log by date, ordered by user and time; `random_train`,
`random_valid` and `random_test` are the random exposures of their days. An example is one feature: a packed block of
sessions (`mmrf_jax.data.records`), which reads hundreds of times faster than a feature per field.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_builder

from mmrf_jax import types
from mmrf_jax.checkpointing import literal
from mmrf_jax.data import records
from mmrf_jax.data.readers.engine import tasks
from mmrf_jax.data.readers.engine.tasks import Engine
from mmrf_jax.data.readers.kuairand import csv_files, prepare
from mmrf_jax.data.readers.kuairand.config import ALL_SPLITS, KuaiRandConfig, digest
from mmrf_jax.data.readers.kuairand.features import read_catalogue
from mmrf_jax.data.readers.kuairand.job import Job
from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.io import copies, files, storage
from mmrf_jax.io.progress import counted, say

#: Increases whenever the same files and config would give other records.
FORMAT = 7
#: Reports progress without checking for a stop: a single process prepares, but all must check equally often.
unchecked = functools.partial(counted, checks=0)
literal.make_globs_literal()


class KuaiRand(dataset_builder.FileReaderBuilder):
    """Session logs of KuaiRand (Gao et al., CIKM 2022), read from a folder of the official files."""

    name = "kuairand"
    VERSION = tfds.core.Version(f"{FORMAT}.0.0")

    def __init__(
        self,
        *,
        data_dir: str | os.PathLike,
        source: str | os.PathLike,
        config: KuaiRandConfig | None = None,
        engine: Engine | None = None,
        progress: Callable[..., Callable[[int], None]] = unchecked,
        **kwargs,
    ):
        """Configure the builder.

        Args:
          data_dir: folder for the records.
          source: folder of the official CSV files, or the parent folder of their `data`.
          config: see `KuaiRandConfig`.
          engine: runs the tasks; `tasks.processes()` by default.
          progress: as `io.progress.counted`, which also checks for a stop; the default does not check.
          **kwargs: arguments of the TFDS builder.
        """
        self.source_dir = os.path.abspath(copies.local(storage.path(source)))  # tasks may run in another folder
        self.session_config = config or KuaiRandConfig()
        self._engine, self._progress = engine, progress
        tfds_config = tfds.core.BuilderConfig(
            name=self.session_config.fingerprint(), description="sessions of requests"
        )
        super().__init__(data_dir=os.path.abspath(data_dir), config=tfds_config, file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="KuaiRand as sessions of requests with candidates.",
            features=prepare.FEATURES,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def download_and_prepare(self, **kwargs) -> None:
        """Prepare the records if they are missing; resume if an earlier call was interrupted.

        Concurrent processes wait for each other; the first does all the work.
        """
        if self.data_path.exists():
            return
        source = csv_files.find_source(self.source_dir)
        name = digest([FORMAT, records.VERSION, dataclasses.asdict(self.session_config), _stats(source)])
        job = Job(source, self.session_config, pathlib.Path(self.data_dir_root) / f".unfinished-{name}")
        with tasks.alone(job.work):
            if self.data_path.exists():  # another process has prepared it meanwhile
                tasks.discard(job.work)
                return
            try:
                with contextlib.ExitStack() as stack:
                    engine = self._engine or stack.enter_context(tasks.processes())
                    self._made = prepare.run(job, engine, self._progress)
                _say_unused(self._made["report"])
                self._kept = job.records
                with contextlib.redirect_stdout(io.StringIO()):  # TFDS would print about downloads
                    super().download_and_prepare(**kwargs)
            except ValueError:  # resuming cannot help: the files or the config must change
                tasks.discard(job.work)
                raise
            tasks.discard(job.work)

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        del dl_manager, download_config
        into = pathlib.Path(self.data_path)
        half_written = shutil.ignore_patterns(".*")  # by tasks that were killed
        shutil.copytree(self._kept, into, copy_function=files.link, dirs_exist_ok=True, ignore=half_written)
        infos = []
        for name, shards in self._made["splits"].items():
            np.save(into / f"blocks-{name}.npy", np.concatenate([np.array(s["blocks"], np.int32) for s in shards]))
            infos.append(
                tfds.core.SplitInfo(
                    name=name,
                    shard_lengths=[len(shard["blocks"]) for shard in shards],
                    num_bytes=sum(shard["bytes"] for shard in shards),
                    filename_template=self._get_filename_template(split_name=name),
                )
            )
        self.info.set_splits(tfds.core.splits.SplitDict(infos))
        self.info.metadata.update(
            report=self._made["report"],
            spec=self._made["spec"],
            config=dataclasses.asdict(self.session_config),
        )


def _say_unused(report: dict) -> None:
    for name, counts in report["log"].items():
        if counts["used"] < counts["rows"]:
            unused = f"{counts['rows'] - counts['used']:,} of {counts['rows']:,} rows"
            say(f"{unused} of the {name} log are not used: {prepare.describe_unused(counts)}")
    for name, counts in report["features"].items():
        if counts["unparsable"]:
            unused = f"{counts['unparsable']:,} of {counts['rows']:,} rows"
            say(f"{unused} of the features of {name} are not used: unparsable")


def _stats(source: csv_files.Source) -> list:
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]


def _finished(root: pathlib.Path) -> list[pathlib.Path]:
    """Return the descriptions of the finished datasets in a folder."""
    found = [root / "dataset_info.json", *root.glob("kuairand/*/[0-9]*/dataset_info.json")]
    return [path for path in found if path.exists()]


def _open(prepared: dataset_builder.DatasetBuilder | str | os.PathLike) -> dataset_builder.DatasetBuilder:
    """Open the finished dataset of a builder or folder; raise as `load`."""
    if isinstance(prepared, dataset_builder.DatasetBuilder):
        root = pathlib.Path(prepared.data_path)
        if not root.exists():
            raise FileNotFoundError(f"{root} is not prepared; call download_and_prepare() first")
    else:
        root = copies.local(storage.path(prepared))
    finished = _finished(root)
    if not finished:
        raise FileNotFoundError(f"{root} holds no prepared KuaiRand; prepare it or name the folder of the records")
    if len(finished) > 1:
        raise ValueError(f"{root} holds {len(finished)} prepared datasets; name one, such as {finished[0].parent}")
    builder = tfds.builder_from_directory(str(finished[0].parent))
    if builder.version.major != FORMAT:
        raise ValueError(
            f"{builder.data_path} has format {builder.version.major}, this code reads {FORMAT}; prepare it again"
        )
    return builder


class Split:
    """The blocks of sessions of a split, read on demand, so that a process reads only its own part."""

    def __init__(self, prepared: dataset_builder.DatasetBuilder | str | os.PathLike, name: str):
        """Open a split.

        Args:
          prepared: the builder or folder, as for `load`.
          name: the split.

        Raises:
          FileNotFoundError, ValueError: as `load`.
        """
        builder = _open(prepared)
        self._source = builder.as_data_source(name)
        self.spec = InputSpec.from_dict(builder.info.metadata["spec"])
        blocks = np.load(pathlib.Path(builder.data_path) / f"blocks-{name}.npy")
        #: [blocks] int32 of each block, available without reading the block.
        self.sessions, self.requests = blocks[:, 0], blocks[:, 1]

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.sessions)

    def read(self, blocks: Sequence[int] | np.ndarray) -> Sessions:
        """Read the sessions of some blocks, in the given order.

        Raises:
          IndexError: for a block that does not exist.
        """
        wrong = [int(b) for b in blocks if not 0 <= b < len(self)]
        if wrong:
            raise IndexError(f"block {wrong[0]} is not among the {len(self)} of the split; count them from 0")
        examples = self._source.__getitems__([int(b) for b in blocks])
        return records.unpack([example["block"] for example in examples], self.spec)

    def read_all(self) -> Sessions:
        """Read all sessions."""
        return self.read(np.arange(len(self)))


def load(
    prepared: dataset_builder.DatasetBuilder | str | os.PathLike,
) -> tuple[dict[str, Sessions], types.Items, InputSpec, dict]:
    """Read all that a `KuaiRand` builder prepared.

    Args:
      prepared: the builder, or the folder it wrote (its `data_path` or, if that holds one dataset, its `data_dir`).

    Returns:
      `{split: Sessions}`, the items (NumPy arrays), the spec, and the report of rows read, left out and used.

    Raises:
      FileNotFoundError: if nothing was prepared, or preparation is unfinished.
      ValueError: if the folder holds several datasets, or one of another format version.
    """
    builder = _open(prepared)
    metadata = builder.info.metadata
    parts = {name: Split(builder, name) for name in ALL_SPLITS}
    splits = {name: part.read_all() for name, part in parts.items()}
    return splits, read_items(builder), InputSpec.from_dict(metadata["spec"]), metadata["report"]


def read_items(prepared: dataset_builder.DatasetBuilder | str | os.PathLike) -> types.Items:
    """Return the items that a builder prepared, as read-only memory maps; raise as `load`."""
    return read_catalogue(pathlib.Path(_open(prepared).data_path) / "catalogue").items


def read_video_ids(prepared: dataset_builder.DatasetBuilder | str | os.PathLike) -> np.ndarray:
    """Return KuaiRand's ids [V] that a builder prepared, −1 for row 0, the unknown video; raise as `load`."""
    return read_catalogue(pathlib.Path(_open(prepared).data_path) / "catalogue").video_id


def read_vocabularies(prepared: dataset_builder.DatasetBuilder | str | os.PathLike) -> dict[str, np.ndarray]:
    """Return KuaiRand's ids of the authors and tags of rows 1, 2, … that a builder prepared; raise as `load`."""
    fitted = read_catalogue(pathlib.Path(_open(prepared).data_path) / "catalogue").fitted
    return {name: fitted[f"{name}_vocabulary"] for name in ("author", "tag")}


def read_report(prepared: dataset_builder.DatasetBuilder | str | os.PathLike) -> dict:
    """Return the report of rows read, left out and used; raise as `load`."""
    return _open(prepared).info.metadata["report"]


def load_or_prepare(
    source: str | os.PathLike,
    cache_dir: str | os.PathLike,
    config: KuaiRandConfig | None = None,
    engine: Engine | None = None,
    progress: Callable[..., Callable[[int], None]] = unchecked,
) -> tuple[dict[str, Sessions], types.Items, InputSpec, dict]:
    """Return `load` of `open_or_prepare`."""
    return load(open_or_prepare(source, cache_dir, config, engine, progress))


def open_or_prepare(
    source: str | os.PathLike,
    cache_dir: str | os.PathLike,
    config: KuaiRandConfig | None = None,
    engine: Engine | None = None,
    progress: Callable[..., Callable[[int], None]] = unchecked,
) -> dataset_builder.DatasetBuilder | str | os.PathLike:
    """Open the records of some files; prepare them unless an earlier call did so for the same files, config and format.

    `source` is the folder of the official files, or one that a builder wrote with the same config. Files are the same
    if their names, sizes and modification times are. `engine` and `progress` are those of `KuaiRand`.

    Raises:
      FileNotFoundError, ValueError: as `csv_files.find_source` and `prepare.run`.
    """
    config = config or KuaiRandConfig()
    source = copies.local(storage.path(source))
    if finished := _finished(source):
        made = finished[0].parent.parent.name
        if made != config.fingerprint():
            raise ValueError(f"{source} was prepared with other settings ({made}); name the folder of the CSV files")
        return source
    stats = _stats(csv_files.find_source(source))
    cache = storage.path(cache_dir) / digest([FORMAT, records.VERSION, dataclasses.asdict(config), stats])
    tfds.disable_progress_bar()
    with copies.built(cache) as folder:
        builder = KuaiRand(data_dir=folder, source=source, config=config, engine=engine, progress=progress)
        builder.download_and_prepare()
    return builder
