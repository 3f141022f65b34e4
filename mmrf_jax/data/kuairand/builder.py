"""A TFDS builder for KuaiRand-Pure, -1K and -27K: official CSV files in, session logs out; no TensorFlow.

    builder = KuaiRand(data_dir=cache, source=kuairand_dir, config=KuaiRandConfig())
    builder.download_and_prepare()  # downloads nothing; a second call does nothing
    splits, items, schema, report = load(builder)

Splits: `train`, `valid`, `test` are sessions of the standard log by date; `random_test` are random exposures of the
test days, for testing only. An example is one feature: a packed block of sessions (`mmrf_jax.data.records`), which
reads hundreds of times faster than a feature per field.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from mmrf_jax import types
from mmrf_jax.data import records
from mmrf_jax.data.kuairand import columns
from mmrf_jax.data.kuairand.prepare import RANDOM_SPLIT, KuaiRandConfig, Prepared, digest
from mmrf_jax.data.schema import Schema, SessionLog
from mmrf_jax.data.splits import SPLITS

#: Changes whenever the same files and config would give other records.
FORMAT = 4
CATALOGUE = "catalogue.npz"


class KuaiRand(tfds.core.GeneratorBasedBuilder):
    """Session logs of KuaiRand (Gao et al., CIKM 2022), read from a folder of the official files."""

    name = "kuairand"
    VERSION = tfds.core.Version(f"{FORMAT}.0.0")

    def __init__(
        self, *, data_dir: str | os.PathLike, source: str | os.PathLike, config: KuaiRandConfig | None = None, **kwargs
    ):
        """
        Args:
          data_dir: where records are written.
          source: folder of the official CSV files, or the folder above their `data`.
          config: see `KuaiRandConfig`.
        """
        self.source_dir = os.fspath(source)
        self.session_config = config or KuaiRandConfig()
        tfds_config = tfds.core.BuilderConfig(
            name=self.session_config.fingerprint(), description="sessions of requests"
        )
        super().__init__(data_dir=os.fspath(data_dir), config=tfds_config, file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        block = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
        return tfds.core.DatasetInfo(
            builder=self,
            description="KuaiRand as sessions of requests with candidates.",
            features=tfds.features.FeaturesDict({"block": block}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        prepared = Prepared.build(columns.find_source(self.source_dir), self.session_config)
        prepared.save(pathlib.Path(self.data_path) / CATALOGUE)
        self.info.metadata.update(
            report=prepared.report,
            schema=dataclasses.asdict(prepared.schema),
            config=dataclasses.asdict(self.session_config),
        )
        return {name: self._generate_examples(prepared, name) for name in (*SPLITS, RANDOM_SPLIT)}

    def _generate_examples(self, prepared: Prepared, split: str):
        for i, log in enumerate(prepared.blocks(split)):
            yield i, {"block": np.frombuffer(records.pack(log, prepared.schema), np.uint8)}


def _finished(root: pathlib.Path) -> list[pathlib.Path]:
    """The descriptions of the datasets that were prepared in a folder."""
    found = [root / "dataset_info.json", *root.glob("kuairand/*/[0-9]*/dataset_info.json")]
    return [path for path in found if path.exists()]


def load(
    prepared: tfds.core.DatasetBuilder | str | os.PathLike,
) -> tuple[dict[str, SessionLog], types.Items, Schema, dict]:
    """Reads what a `KuaiRand` builder prepared.

    Args:
      prepared: the builder, or the folder that it wrote (its `data_path` or, where that holds one dataset, its
        `data_dir`).

    Returns:
      `{split: SessionLog}`, the items (NumPy arrays), the schema, and the report of rows read, left out and used.

    Raises:
      FileNotFoundError: where nothing (or something unfinished) was prepared.
      ValueError: where the folder holds several datasets, or one of another format version.
    """
    if isinstance(prepared, tfds.core.DatasetBuilder):
        builder = prepared
    else:
        root = pathlib.Path(prepared)
        finished = _finished(root)
        if not finished:
            raise FileNotFoundError(f"{root} holds no prepared KuaiRand; prepare it or name the folder of the records")
        if len(finished) > 1:
            raise ValueError(f"{root} holds {len(finished)} prepared datasets; name one, such as {finished[0].parent}")
        builder = tfds.builder_from_directory(str(finished[0].parent))
    if not pathlib.Path(builder.data_path).exists():
        raise FileNotFoundError(f"{builder.data_path} is not prepared; call download_and_prepare() first")
    if builder.version.major != FORMAT:
        raise ValueError(
            f"{builder.data_path} has format {builder.version.major}, this code reads {FORMAT}; prepare it again"
        )
    metadata = builder.info.metadata
    schema = Schema(**metadata["schema"])
    splits = {}
    for name in (*SPLITS, RANDOM_SPLIT):
        source = builder.as_data_source(name)
        splits[name] = records.unpack([source[i]["block"] for i in range(len(source))], schema)
    with np.load(pathlib.Path(builder.data_path) / CATALOGUE) as saved:
        fields = {f.name: saved[f"items/{f.name}"] for f in dataclasses.fields(types.Items)}
    items = types.Items(**{k: int(v) if v.ndim == 0 else v for k, v in fields.items()})
    return splits, items, schema, metadata["report"]


def load_or_prepare(
    source: str | os.PathLike, cache_dir: str | os.PathLike, config: KuaiRandConfig | None = None
) -> tuple[dict[str, SessionLog], types.Items, Schema, dict]:
    """`load`, after preparing where no earlier call did so for the same files, config and format.

    `source` is the folder of the official files, or one that a builder wrote with the same config.

    Files are the same where their names, sizes and times of change are. Processes that prepare at once do not disturb
    each other: a dataset appears by a rename, and the first to finish wins.

    Raises:
      FileNotFoundError, ValueError: as `columns.find_source`, the readers and `candidates.Pool.check`.
    """
    config = config or KuaiRandConfig()
    if finished := _finished(pathlib.Path(source)):
        made = finished[0].parent.parent.name
        if made != config.fingerprint():
            raise ValueError(f"{source} was prepared with other settings ({made}); name the folder of the CSV files")
        return load(source)
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in columns.find_source(source).files]
    cache = pathlib.Path(cache_dir) / digest([FORMAT, records.VERSION, dataclasses.asdict(config), stats])
    tfds.disable_progress_bar()
    builder = KuaiRand(data_dir=cache, source=source, config=config)
    try:
        builder.download_and_prepare()
    except OSError:
        builder = KuaiRand(data_dir=cache, source=source, config=config)
        if not pathlib.Path(builder.data_path).exists():  # no other process finished it
            raise
    return load(builder)
