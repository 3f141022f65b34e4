"""Conversion of the official files to record shards, in tasks that each process a small part of the log.

    videos    a chunk of the video features, sorted by video                                  one task per chunk
    feature   the features of some videos, each once                                          one task per part
    sort      a chunk of the log's lines, sorted by user                                      one task per chunk
    clean     some users' rows of all chunks: duplicates, reasons, facts about videos         one task per bucket
    merge     the facts of all buckets about some videos                                      one task per part
    fit       vocabularies, features, profiles, pools, the report                             one task
    write     sessions of a bucket's users with candidates and histories, a shard per split   one task per bucket

The outputs of a task appear by renames, the last of which marks it as done, so an interrupted job resumes with the
missing tasks. Any `Engine` may run the tasks of a stage, in any order and in parallel: chunks, buckets and parts depend
only on the files, and so do the records.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl

from mmrf_jax.data.readers.engine import candidates, shards, tasks
from mmrf_jax.data.readers.engine.build import SessionPlan, SessionSizes, UserBucket, plan_sessions
from mmrf_jax.data.readers.engine.tasks import Engine, publish_array, publish_json
from mmrf_jax.data.readers.kuairand import clean, csv_files, requests
from mmrf_jax.data.readers.kuairand.config import SESSION_GAP_MINUTES, KuaiRandConfig
from mmrf_jax.data.readers.kuairand.features import (
    Catalogue,
    build_catalogue,
    build_profiles,
    read_catalogue,
    read_profiles,
    write_profiles,
)
from mmrf_jax.data.readers.kuairand.release import Release, is_random
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.data.splits import PARTS, RANDOM, SPLITS
from mmrf_jax.io.progress import Counter
from mmrf_jax.signals import SHORT_VIDEO

#: Increases whenever the same files and config would give another log.
FORMAT = 8
#: The file that says what a folder holds.
ABOUT = "kuairand.json"
_DAYS = (*SPLITS, "between")  # by the number of the split; −1 is the last


@dataclasses.dataclass(frozen=True)
class KuaiRandJob(tasks.TaskJob):
    """The files and the config of a preparation.

    Attributes:
      release: the official files.
      config: see `KuaiRandConfig`.
      work: folder of all outputs, the same for all processes.
      chunk_bytes: size of the chunk of files that a task reads.
      bucket_rows: number of rows of the users in one task's sessions. Both sizes determine the memory of a task, and
        where blocks of sessions end.
    """

    release: Release
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
        return self.config.session_gap_minutes or SESSION_GAP_MINUTES[self.release.variant]


def run_stages(job: KuaiRandJob, engine: Engine, progress: Counter) -> pathlib.Path:
    """Run the tasks that have not run before.

    Args:
      job: what to prepare.
      engine: runs the tasks.
      progress: as `io.progress.counted`.

    Returns:
      The folder of the finished log (`builder.KuaiRand`).

    Raises:
      ValueError: for a file that is not CSV or lacks a column, one whose rows are mostly in another format than the
        release (`clean.check_format`), no usable row on training days, or fewer live videos than candidates.
    """

    stage = functools.partial(tasks.run_stage, job, engine, progress)
    cut = functools.partial(job.cut, rows=job.bucket_rows)
    csv_files.check_headers(job.release)
    if not (job.work / "cleaned.json").exists():
        stage("videos", sort_videos, len(_chunks(job, job.release.videos)), "arrow")
        cut("video_parts", "videos", "video_id")
        stage("feature", merge_videos, job.parts("video_parts"), "arrow")
        csv_files.check_cells(job.release.videos[0], csv_files.add_cells([m["cells"] for m in job.read_all("videos")]))
        _save_durations(job)
        stage("sort", sort_chunk, len(_chunks(job, job.release.logs)), "arrow")
        _check_logs(job)
        cut("buckets", "sort", "user_id")
        stage("clean", clean_bucket, job.parts("buckets"))
        publish_json(job.work / "cleaned.json", _merge_counts(job))
    _check_usable(job)
    with ThreadPoolExecutor(1) as aside:
        for done in ("sort", "videos"):
            aside.submit(shutil.rmtree, job.work / done, ignore_errors=True)
        cut("fact_parts", "facts", "video_id")
        stage("merge", merge_facts, job.parts("fact_parts"), "arrow")
    stage("fit", fit_log, 1)
    stage("write", write_bucket, job.parts("buckets"))
    made, fitted = job.read_all("write"), job.read_all("fit")[0]
    spec = InputSpec.from_dict(fitted["spec"])
    counts = {name: shards.finish_part(job.records / name, [of[name] for of in made], spec, False) for name in PARTS}
    about = {
        "format": FORMAT,
        "config": dataclasses.asdict(job.config),
        "report": fitted["report"] | {"splits": counts},
    }
    publish_json(job.records / ABOUT, about)  # last: it says that the log is complete
    return job.records


def _chunks(job: KuaiRandJob, paths: tuple[pathlib.Path, ...]) -> list[list[csv_files.Chunk]]:
    """Return the chunks of each task: one, or several small ones."""
    tasks: list[list[csv_files.Chunk]] = []
    size = 0
    for chunk in (chunk for path in paths for chunk in csv_files.chunks(path, job.chunk_bytes)):
        size += chunk.end - chunk.start
        if not tasks or size > job.chunk_bytes:
            tasks.append([])
            size = chunk.end - chunk.start
        tasks[-1].append(chunk)
    return tasks


def _sum(counts: list[dict[str, int]]) -> dict[str, int]:
    return {key: sum(of[key] for of in counts) for key in counts[0]}


def sort_videos(job: KuaiRandJob, task: int) -> None:
    """Write a chunk of the video features as a run, sorted by video."""
    read = [csv_files.read_videos(chunk) for chunk in _chunks(job, job.release.videos)[task]]
    rows = pl.concat([frame for frame, _ in read], how="vertical_relaxed")
    videos = rows.filter(pl.col("video_id").is_not_null())
    cells = csv_files.add_cells([of for _, of in read])
    publish_json(job.path("videos", task, "json"), {"rows": len(rows), "used": len(videos), "cells": cells})
    tasks.write_run(videos.sort("video_id", maintain_order=True), job.path("videos", task))


def merge_videos(job: KuaiRandJob, task: int) -> None:
    """Write the features of some videos; of videos listed more than once, the first."""
    part = tasks.read_part(job.made("videos"), job.cuts("video_parts"), task)
    part = part.sort("video_id", maintain_order=True)
    tasks.write_run(part.filter(pl.col("video_id").is_first_distinct()), job.path("feature", task))


def _save_durations(job: KuaiRandJob) -> None:
    """Save ids and durations (ms, 0 if unknown) of all videos with features, for tasks to memory-map.

    Raises:
      ValueError: if most are in another unit.
    """
    ids, duration = (tasks.read_column(job.made("feature"), name) for name in ("video_id", "duration_ms"))
    # A sentinel, so that every search finds an entry.
    last = np.array(np.iinfo(ids.to_numpy().dtype).max, ids.to_numpy().dtype)
    publish_array(job.work / "featured_id.npy", np.append(ids.to_numpy(), last))
    milliseconds = duration.fill_null(0).clip(0, 2**31 - 1).cast(pl.Int32).to_numpy()
    clean.check_durations(job.release.videos[0], milliseconds)
    publish_array(job.work / "featured_duration.npy", np.append(milliseconds, np.int32(0)))


def sort_chunk(job: KuaiRandJob, task: int) -> None:
    """Write a chunk of the log as a run, sorted by user."""
    frames, counts = [], []
    for chunk in _chunks(job, job.release.logs)[task]:
        random_file = is_random(chunk.path)
        frames.append(clean.mark(csv_files.read_log_lines(chunk), random_file))
        counts.append((chunk.path.name, clean.count_format_signs(frames[-1], random_file)))
    publish_json(job.path("sort", task, "json"), counts)
    tasks.write_run(pl.concat(frames, how="vertical_relaxed").sort("user_id"), job.path("sort", task))


def _check_logs(job: KuaiRandJob) -> None:
    """Raise ValueError for a log file whose rows are mostly in another format than the release."""
    counts = [pair for made in job.read_all("sort") for pair in made]
    for path in job.release.logs:

        def find(reason: str, path: pathlib.Path = path) -> str:
            return clean.find_unusable(path, job.chunk_bytes, _known_durations(job), [reason]) or ""

        clean.check_format(path, _sum([of for name, of in counts if name == path.name]), find)


def _known_durations(job: KuaiRandJob) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from video ids [n] to durations [n] in ms, 0 if the features have none."""
    ids, duration = (np.load(job.work / f"featured_{name}.npy", mmap_mode="r") for name in ("id", "duration"))

    def known(video: np.ndarray) -> np.ndarray:
        place = np.searchsorted(ids[:-1], video)  # the sentinel, if no id is as large
        return np.where(ids[place] == video, duration[place], 0)

    return known


def clean_bucket(job: KuaiRandJob, task: int) -> None:
    """Write the usable rows of a bucket's users, their facts about videos, and counts."""
    known, rows = _known_durations(job), tasks.read_part(job.made("sort"), job.cuts("buckets"), task)
    rows, every, report = clean.clean_rows(rows, known)
    facts = clean.describe_videos(every, job.config.train_until)
    for folder, frame in (("rows", rows), ("facts", facts)):
        (job.work / folder).mkdir(exist_ok=True)
        tasks.write_run(frame, job.path(folder, task))
    split = pl.Series("split", job.config.dates.split_of(rows["date"].to_numpy()))
    parts = (
        rows.with_columns(split)
        .group_by("is_rand", "split")
        .agg(
            pl.len().alias("rows"),
            pl.col("date").min().alias("first"),
            pl.col("time_ms").max().alias("end"),
            pl.col("user_id").unique().alias("users"),
        )
    )
    publish_json(job.path("clean", task, "json"), {"log": report, "parts": parts.to_dicts()})


def _merge_counts(job: KuaiRandJob) -> dict:
    """Merge the counts of `clean_bucket` over all buckets: by log, and by part with the days between the splits."""
    made, videos = job.read_all("clean"), job.read_all("videos")
    parts: dict[str, dict] = {
        random + name: {"rows": 0, "first": None, "end": 0, "users": []} for random in ("", "random_") for name in _DAYS
    }
    for of in (part for bucket in made for part in bucket["parts"]):
        into = parts["random_" * of["is_rand"] + _DAYS[of["split"]]]
        first, end = min(of["first"], into["first"] or of["first"]), max(of["end"], into["end"])
        into |= {"rows": into["rows"] + of["rows"], "first": first, "end": end, "users": into["users"] + of["users"]}
    return {
        "log": {log: _sum([bucket["log"][log] for bucket in made]) for log in made[0]["log"]},
        "parts": parts,
        "videos": {"rows": sum(m["rows"] for m in videos), "unparsable": sum(m["rows"] - m["used"] for m in videos)},
    }


def _check_usable(job: KuaiRandJob) -> None:
    """Raise ValueError if the standard log has no usable row on the training days."""
    cleaned = job.read("cleaned.json")
    if cleaned["parts"]["train"]["rows"]:
        return
    counts = cleaned["log"]["standard"]
    if counts["used"]:
        first = min(first for name in _DAYS if (first := cleaned["parts"][name]["first"]))
        raise ValueError(
            f"no standard-log row on or before train_until={job.config.train_until}; the first is of {first}: set "
            "train_until to that day or later"
        )
    folder = job.release.logs[0].parent
    if not counts["rows"]:
        raise ValueError(f"{folder} holds no row of the standard log; copy log_standard_*.csv to it")
    known = _known_durations(job)
    found = ((path, clean.find_unusable(path, job.chunk_bytes, known, clean.REASONS)) for path in job.release.logs)
    path, first = next((path, first) for path, first in found if first)
    raise ValueError(
        f"none of the {counts['rows']:,} rows of the standard log in {folder} can be used: {describe_unused(counts)}; "
        f"the first is {path}, {first}; see docs/reading-logs.md"
    )


def describe_unused(counts: dict[str, int]) -> str:
    """Describe how many rows of a log are unused for each reason, such as `2 unparsable, 1 no_duration`."""
    return ", ".join(f"{counts[key]:,} {key}" for key in (*clean.REASONS, "duplicates") if counts[key])


def merge_facts(job: KuaiRandJob, task: int) -> None:
    """Merge the facts of all buckets about some videos."""
    part = tasks.read_part(job.made("facts"), job.cuts("fact_parts"), task)
    tasks.write_run(clean.fold_videos(part), job.path("merge", task))


def fit_log(job: KuaiRandJob, task: int) -> None:
    """Fit everything on the training days, as arrays in `job.records`; write the report so far, and the spec."""
    config, cleaned = job.config, job.read("cleaned.json")
    parts = cleaned["parts"]
    for folder in (job.records / "catalogue", job.records / "profiles", job.work / "pools"):
        folder.mkdir(parents=True, exist_ok=True)
    facts, videos = job.made("merge"), job.made("feature")
    build_catalogue(facts, videos, config.train_until, job.records / "catalogue")
    by_log = clean.count_videos(tasks.read_column(facts, "mentions").to_numpy())
    featured = len(tasks.read_column(videos, "video_id"))
    catalogue = read_catalogue(job.records / "catalogue")
    read_users, cells = csv_files.read_users(job.release.users)
    csv_files.check_cells(job.release.users[0], cells)
    profiles = build_profiles(read_users, np.array(parts["train"]["users"]))
    write_profiles(profiles, job.records / "profiles")
    _save_pools(job, catalogue, parts)
    items, users_of = catalogue.items, {name: np.array(of["users"], np.int64) for name, of in parts.items()}
    users = np.unique(np.concatenate([users_of[name] for name in _DAYS]))
    every = np.concatenate([profiles.user_id, users, *(users_of[name] for name in RANDOM)])
    spec = InputSpec(
        num_videos=len(catalogue.video_id),
        num_authors=items.num_authors,
        num_tags=items.num_tags,
        num_users=_number_users(job, np.unique(every)),
        item_features=items.features.shape[1],
        profile=profiles.values.shape[1],
        context=requests.CONTEXT,
        candidates=config.candidates,
        slate=config.slate,
        history=config.history,
        signals=SHORT_VIDEO,
    )
    report = {
        "variant": job.release.variant,
        "files": [path.name for path in job.release.files],
        "log": {log: counts | by_log[log] for log, counts in cleaned["log"].items()},
        "session_gap_minutes": job.session_gap_minutes,
        "standard_rows_between_splits": parts["between"]["rows"],
        "users_without_features": int((profiles.rows_of(users) == 0).sum()),
        "features": _count_features(read_users, len(profiles.user_id) - 1, cleaned["videos"], featured),
        "videos": spec.num_videos - 1,
        "videos_without_features": spec.num_videos - 1 - featured,
        "videos_never_candidates": int((catalogue.live_from[1:] == clean.NEVER).sum()),
    }
    publish_json(job.path("fit", task, "json"), {"report": report, "spec": dataclasses.asdict(spec)})


def _count_features(
    users: pl.DataFrame, different_users: int, videos: dict[str, int], different_videos: int
) -> dict[str, dict[str, int]]:
    """Return {"users", "videos": counts of the rows of feature files}, given the counts of videos, and usable ids."""
    listed = len(users["user_id"].drop_nulls())
    of_users = {"rows": len(users), "unparsable": len(users) - listed, "duplicates": listed - different_users}
    duplicates = videos["rows"] - videos["unparsable"] - different_videos
    return {"users": of_users, "videos": videos | {"duplicates": duplicates}}


def _save_pools(job: KuaiRandJob, catalogue: Catalogue, parts: dict[str, dict]) -> None:
    """Save the videos that may be candidates by the day from which they are live: of the standard and the random log.

    Raises:
      ValueError: if fewer than C are live on the first day of a part.
    """
    # Pure is the whole pool of the random log; in the larger releases only its exposures reveal that pool.
    days = {"standard": catalogue.live_from, "random": catalogue.live_from}
    if job.release.variant != "pure":
        days["random"] = np.maximum(catalogue.live_from, catalogue.random_from)
    for log, day in days.items():
        pool = candidates.make_pool(day, clean.NEVER)
        for name in PARTS:
            if parts[name]["rows"] and log == _pool_of(name):
                pool.check(parts[name]["first"], job.config.candidates, job.config.slate)
        pool.save(job.work / "pools" / log)


def _number_users(job: KuaiRandJob, ids: np.ndarray) -> int:
    """Return one more than the largest user number among the sorted distinct `ids`, −1 included.

    Users' numbers are their ids. Ids too large for int32 are numbered in order, which is saved for `write_bucket`.
    """
    if ids[-1] < 2**31 - 1:
        return int(ids[-1]) + 1
    publish_array(job.records / "user_ids.npy", ids[1:])
    return len(ids) - 1


def _pool_of(split: str) -> str:
    """Return the log whose pool gives a split's candidates.

    The random log's pool is used for testing; on earlier days it is not known.
    """
    return "random" if split == "random_test" else "standard"


def open_bucket(job: KuaiRandJob, task: int) -> tuple[UserBucket, dict[str, SessionPlan]]:
    """Return a bucket of a job whose `fit_log` is done, and the plans of all parts."""
    numbered, config, cleaned = job.records / "user_ids.npy", job.config, job.read("cleaned.json")
    pools = {log: candidates.read_pool(job.work / "pools" / log) for log in ("standard", "random")}
    frame = pl.scan_ipc(job.path("rows", task), glob=False).collect()
    catalogue, profiles = read_catalogue(job.records / "catalogue"), read_profiles(job.records / "profiles")
    rows = requests.arrange_rows(frame, catalogue, config.seed, np.load(numbered) if numbered.exists() else None)
    sizes = SessionSizes(
        config.candidates, config.slate, config.history, job.session_gap_minutes, config.request_gap_minutes
    )
    pool_of = {name: pools[_pool_of(name)] for name in PARTS}
    profile_row = profiles.rows_of(frame["user_id"].to_numpy())
    bucket = UserBucket(
        rows, sizes, requests.KuaiRandLookup(rows, sizes.candidates, pool_of, profiles.values, profile_row)
    )
    split, until = config.dates.split_of(rows.day), {"train": config.train_until, "valid": config.valid_until}
    return bucket, {
        name: plan_sessions(rows, name, split, sizes, cleaned["parts"][name]["end"], until.get(name)) for name in PARTS
    }


def write_bucket(job: KuaiRandJob, task: int) -> None:
    """Write the shards of a bucket's users, one per part, and their counts."""
    (bucket, plans), spec = open_bucket(job, task), InputSpec.from_dict(job.read_all("fit")[0]["spec"])
    name = shards.shard_name(task, job.parts("buckets"))
    made = {part: shards.write_shard(job.records / part / name, bucket, of, spec) for part, of in plans.items()}
    publish_json(job.path("write", task, "json"), made)
