"""Prepared logs as TensorFlow Datasets, for pipelines that read those; TensorFlow itself is not needed. For example:

    log = kuairand.open_or_prepare(source, config)  # or mmrf.SessionLog.open(folder)
    tfds.write(log.parts, "datasets", name="kuairand")

    import tensorflow_datasets
    builder = tensorflow_datasets.builder("kuairand", data_dir="datasets")
    for session in builder.as_data_source("train"): ...

An example has the arrays of one session as the log has them (`records.layout`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mmrf_jax.data import records
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.io import extras, files

VERSION = "1.0.0"


def write(parts: Mapping[str, records.Blocks], data_dir: str | os.PathLike, name: str = "sessions") -> Any:
    """Write the parts of a log as the splits of a TensorFlow dataset, one session an example.

    An example has the fields of `Sessions`: `user_id`, `date`, `profile` [Du], `terminated`, `truncated`; of the
    history `history_videos` [H], `history_feedback` [H, S] and `history_mask` [H]; of the T requests `context` [T, Dc],
    `candidates` [T, C], `slate` [T, K] (positions among the candidates), `feedback` [T, K, S] and `log_propensity` [T].
    Parts without sessions are no splits.

    Args:
      parts: {"train": sessions on disk, ...}, such as `SessionLog.parts` or those of KuaiRand.
      data_dir: folder of TensorFlow datasets.
      name: of the dataset, in lower case with underscores, such as `my_shop`.

    Returns:
      The `tensorflow_datasets` builder of the dataset; `builder.as_data_source("train")` reads it.

    Raises:
      FileExistsError: if the folder has a dataset of this name.
      ValueError: for another name, or if no part has sessions.
      MissingExtra: without tensorflow-datasets.
    """
    with extras.needed("data"):
        import tensorflow_datasets as tfds

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name is {name!r}; use lower-case letters, digits and underscores, such as 'my_shop'")
    folder = files.user_path(str(data_dir), "data_dir")
    if (folder / name).exists():
        raise FileExistsError(f"{folder / name} exists; remove it or use another name")
    used = {part: blocks for part, blocks in parts.items() if blocks.total[0]}
    if not used:
        raise ValueError(f"no part of {', '.join(parts)} has sessions; there is nothing to write to {folder / name}")
    tfds.disable_progress_bar()
    builder = _builder(tfds, name, used)(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder


def _builder(tfds: Any, dataset: str, parts: Mapping[str, records.Blocks]) -> type:
    """Return the builder of a dataset as a class, as TFDS asks for."""
    spec = next(iter(parts.values())).spec

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version(VERSION)
        name = dataset

        def _info(self):
            said = f"Sessions with the signals {', '.join(spec.signals.names)}."
            features = _features(tfds.features, spec)
            return tfds.core.DatasetInfo(builder=self, description=said, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {part: self._generate_examples(blocks) for part, blocks in parts.items()}

        def _generate_examples(self, blocks):
            return _sessions(blocks)

    return Builder


def _fields(spec: InputSpec) -> list[tuple[str, bool, np.dtype, tuple[int, ...]]]:
    """Return (field, one row per session?, dtype, shape of a row) of what an example has."""
    return [
        (name, per_session, np.dtype(dtype), shape)
        for name, per_session, dtype, shape in records.layout(spec)
        if name not in ("lengths", "scores")
    ]


def _features(features: Any, spec: InputSpec) -> Any:
    """Return the features of an example; None is the number of requests."""
    return features.FeaturesDict(
        {
            name: features.Tensor(shape=shape if per_session else (None, *shape), dtype=dtype.type)
            for name, per_session, dtype, shape in _fields(spec)
        }
    )


def _sessions(blocks: records.Blocks) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield (number, example) of every session of a part."""
    fields, number = _fields(blocks.spec), 0
    for block in range(len(blocks.sessions)):
        log = blocks.read([block])
        for i in range(log.num_sessions):
            requests = slice(log.offsets[i], log.offsets[i + 1])
            yield number, {name: getattr(log, name)[i if of_session else requests] for name, of_session, _, _ in fields}
            number += 1
