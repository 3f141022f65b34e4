"""A TFDS builder for KuaiRand-Pure, -1K and -27K: official CSV files in, session logs out; no TensorFlow.

    builder = KuaiRand(data_dir=cache, source=kuairand_dir, config=KuaiRandConfig())
    builder.download_and_prepare()  # downloads nothing; a second call does nothing
    splits, items, schema, report = load(builder)

Splits: `train`, `valid`, `test` are sessions of the standard log by date; `random_test` are random exposures of the test
days, for testing only. An example is one feature: a packed block of sessions (`mmrf_jax.data.records`), which reads
hundreds of times faster than a feature per field.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib

import numpy as np
import polars as pl
import tensorflow_datasets as tfds
from absl import logging

from mmrf_jax import types
from mmrf_jax.data import records
from mmrf_jax.data.kuairand import candidates, clean, columns, features, requests
from mmrf_jax.data.schema import Schema, SessionLog
from mmrf_jax.data.splits import SPLITS, SplitDates

#: Changes whenever the same files and config would give other records.
FORMAT = 1
CATALOGUE = "catalogue.npz"
SESSION_GAP_MINUTES = {"pure": 24 * 60, "1k": 30, "27k": 30}
RANDOM_SPLIT = "random_test"


@dataclasses.dataclass(frozen=True)
class KuaiRandConfig:
    """How logs become sessions.

    Attributes:
      train_until, valid_until, test_from: days of the splits, such as 20220502.
      candidates: C of a request. slate: K, the most videos of a request. history: H.
      session_gap_minutes: absence that ends a session; None is a day for Pure, which keeps few videos of each feed, and
        half an hour for 1K and 27K.
      request_gap_minutes: the most minutes between two videos of a request.
      seed: of the candidates.

    Raises:
      ValueError: for sizes that cannot be.
    """

    train_until: int = 20220502
    valid_until: int = 20220503
    test_from: int = 20220504
    candidates: int = 100
    slate: int = 6
    history: int = 32
    session_gap_minutes: float | None = None
    request_gap_minutes: float = 30.0
    seed: int = 0

    def __post_init__(self):
        self.dates  # noqa: B018 validates
        for name in ("slate", "history"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; set it to 1 or more")
        if self.candidates < self.slate:
            raise ValueError(f"candidates={self.candidates} is less than slate={self.slate}; raise candidates")
        for name in ("session_gap_minutes", "request_gap_minutes"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value} is not positive; set it to the minutes of an absence")

    @property
    def dates(self) -> SplitDates:
        return SplitDates(self.train_until, self.valid_until, self.test_from)

    def fingerprint(self) -> str:
        """16 hex digits that differ where any field differs."""
        return _digest(dataclasses.asdict(self))


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
        prepared = _Prepared.build(columns.find_source(self.source_dir), self.session_config)
        prepared.save(pathlib.Path(self.data_path) / CATALOGUE)
        self.info.metadata.update(
            report=prepared.report,
            schema=dataclasses.asdict(prepared.schema),
            config=dataclasses.asdict(self.session_config),
        )
        return {name: self._generate_examples(prepared, name) for name in (*SPLITS, RANDOM_SPLIT)}

    def _generate_examples(self, prepared: _Prepared, split: str):
        for i, log in enumerate(prepared.blocks(split)):
            yield i, {"block": np.frombuffer(records.pack(log, prepared.schema), np.uint8)}


@dataclasses.dataclass
class _Prepared:
    """All that is known once the files are read, except the candidates and histories, which are made block by block."""

    config: KuaiRandConfig
    catalogue: features.Catalogue
    profiles: features.Profiles
    plans: dict[str, requests.Plan]
    pools: dict[str, candidates.Pool]
    report: dict

    @classmethod
    def build(cls, source: columns.Source, config: KuaiRandConfig) -> _Prepared:
        videos = columns.read_videos(source.videos)
        frame, report = clean.clean_log(source, videos)
        catalogue = features.build_catalogue(frame, videos, config.train_until)
        is_random = pl.col("is_rand") == 1
        standard, random = frame.filter(~is_random), frame.filter(is_random & (pl.col("date") >= config.test_from))
        del frame
        train_users = standard.filter(pl.col("date") <= config.train_until)["user_id"].unique().to_numpy()
        profiles = features.build_profiles(columns.read_users(source.users), train_users)

        rows = requests.Rows.from_frame(standard, catalogue.rows_of(standard["video_id"].to_numpy()))
        session_gap = config.session_gap_minutes or SESSION_GAP_MINUTES[source.variant]
        split = config.dates.split_of(rows.date)
        plans = {}
        for i, (name, last) in enumerate(zip(SPLITS, (config.train_until, config.valid_until, None), strict=True)):
            past = np.ones(len(rows), bool) if last is None else rows.date <= last
            plans[name] = requests.plan_standard(
                rows.take(past), split[past] == i, config.slate, session_gap, config.request_gap_minutes
            )
        random_rows = requests.Rows.from_frame(random, catalogue.rows_of(random["video_id"].to_numpy()))
        plans[RANDOM_SPLIT] = requests.plan_random(random_rows, rows)

        # Pure is the pool of the random log, whole; in the larger releases that pool is known by its exposures only
        pool = candidates.Pool(catalogue.live_from, features.NEVER)
        random_from = np.maximum(catalogue.live_from, catalogue.random_from)
        random_pool = pool if source.variant == "pure" else candidates.Pool(random_from, features.NEVER)
        pools = {name: random_pool if name == RANDOM_SPLIT else pool for name in plans}
        report = {
            "variant": source.variant,
            "files": [path.name for path in source.files],
            "log": report,
            "session_gap_minutes": session_gap,
            "standard_rows_between_splits": int((split < 0).sum()),
            "users_without_features": int((profiles.rows_of(np.unique(rows.user)) == 0).sum()),
            "videos": catalogue.items.num_videos - 1,
            "videos_without_features": catalogue.items.num_videos - 1 - int(videos["video_id"].drop_nulls().len()),
            "videos_never_candidates": int((catalogue.live_from[1:] == features.NEVER).sum()),
            "splits": {name: _counts(plan) for name, plan in plans.items()},
        }
        for name, plan in plans.items():
            pools[name].check(plan.rows.date[plan.request_first[:-1]], config.candidates)
            logging.info("KuaiRand %s: %s", name, ", ".join(f"{v} {k}" for k, v in report["splits"][name].items()))
        return cls(config, catalogue, profiles, plans, pools, report)

    @property
    def schema(self) -> Schema:
        items = self.catalogue.items
        return Schema(
            num_videos=items.num_videos,
            num_authors=items.num_authors,
            num_tags=items.num_tags,
            item_features=items.features.shape[1],
            profile=self.profiles.values.shape[1],
            context=requests.CONTEXT,
            candidates=self.config.candidates,
            slate=self.config.slate,
            history=self.config.history,
        )

    def save(self, path: pathlib.Path) -> None:
        items = {f.name: getattr(self.catalogue.items, f.name) for f in dataclasses.fields(types.Items)}
        fitted = {f"fitted/{k}": v for k, v in {**self.catalogue.fitted, **self.profiles.fitted}.items()}
        live = {"live_from": self.catalogue.live_from, "video_id": self.catalogue.video_id}
        np.savez(path, **{f"items/{k}": v for k, v in items.items()}, **fitted, **live)

    def blocks(self, split: str):
        """Sessions of a split, `records.SESSIONS_PER_RECORD` at a time; one empty block where there are none."""
        step, total = records.SESSIONS_PER_RECORD, self.plans[split].num_sessions
        for start in range(0, max(total, 1), step):
            yield self.gather(split, np.arange(start, min(start + step, total)))

    def gather(self, split: str, sessions: np.ndarray) -> SessionLog:
        """The log of consecutive sessions."""
        plan, k = self.plans[split], self.config.slate
        first = int(plan.session_first[sessions[0]]) if len(sessions) else 0
        end = int(plan.session_first[sessions[-1] + 1]) if len(sessions) else 0
        offsets = np.append(plan.session_first[sessions], end) - first
        request = np.arange(first, end)
        row, after = plan.request_first[request], plan.request_first[request + 1]
        exposure = row[:, None] + np.arange(k)
        shown = exposure < after[:, None]
        exposure = np.where(shown, exposure, row[:, None])
        exposed = np.where(shown, plan.rows.item[exposure], -1)
        feedback = plan.rows.feedback(exposure)
        feedback[~shown] = 0
        day = plan.rows.date[row]
        key = candidates.request_keys(
            self.config.seed, plan.rows.user[row], plan.rows.time[row], self.catalogue.video_id[plan.rows.item[row]]
        )
        drawn, slate = self.pools[split].sample(key, day, exposed, self.config.candidates)
        videos, history_feedback, mask = plan.history(sessions, self.config.history)
        start = plan.request_first[plan.session_first[sessions]]
        terminated = plan.terminated[sessions]
        known = -np.log(self.config.candidates) if split == RANDOM_SPLIT else np.nan
        return SessionLog(
            user_id=plan.rows.user[start],
            date=plan.rows.date[start],
            profile=self.profiles.of(plan.rows.user[start]),
            history_videos=videos,
            history_feedback=history_feedback,
            history_mask=mask,
            terminated=terminated,
            truncated=~terminated,
            offsets=offsets.astype(np.int64),
            context=plan.context(request, request - np.repeat(plan.session_first[sessions], np.diff(offsets))),
            candidates=drawn,
            slate=slate,
            feedback=feedback,
            log_propensity=np.full(len(request), known, np.float32),
            scores=None,
        )


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
    builder = prepared
    if not isinstance(prepared, tfds.core.DatasetBuilder):
        root = pathlib.Path(prepared)
        finished = [root / "dataset_info.json", *root.glob("kuairand/*/[0-9]*/dataset_info.json")]
        finished = [path for path in finished if path.exists()]
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

    Files are the same where their names, sizes and times of change are. Processes that prepare at once do not disturb
    each other: a dataset appears by a rename, and the first to finish wins.

    Raises:
      FileNotFoundError, ValueError: as `columns.find_source`, the readers and `candidates.Pool.check`.
    """
    config = config or KuaiRandConfig()
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in columns.find_source(source).files]
    cache = pathlib.Path(cache_dir) / _digest([FORMAT, dataclasses.asdict(config), stats])
    tfds.disable_progress_bar()
    builder = KuaiRand(data_dir=cache, source=source, config=config)
    try:
        builder.download_and_prepare()
    except OSError:
        builder = KuaiRand(data_dir=cache, source=source, config=config)
        if not pathlib.Path(builder.data_path).exists():  # no other process finished it
            raise
    return load(builder)


def _counts(plan: requests.Plan) -> dict[str, int]:
    return {
        "users": len(np.unique(plan.rows.user)),
        "sessions": plan.num_sessions,
        "requests": len(plan.request_first) - 1,
        "exposures": len(plan.rows),
        "terminated": int(plan.terminated.sum()),
    }


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
