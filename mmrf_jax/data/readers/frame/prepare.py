"""Any table as sessions on disk, in tasks that each hold a small part of the log.

    sort      a chunk of rows: columns checked and typed, by the bucket of their users        one task per chunk
    order     a bucket of users: requests in their order, facts about items and users         one task per bucket
    check     whether several users have a request of the same id                             one task per part
    write     sessions of a bucket with candidates and histories, a shard per part            one task per bucket

Before `write`, `fit` makes the tables of items and users from the facts. The memory of a task does not depend on the
number of rows; that of `fit` grows with items and users. Any `Engine` may run the tasks of a stage.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from mmrf_jax.data import frame_log
from mmrf_jax.data.readers.engine import shards, tasks
from mmrf_jax.data.readers.engine.build import SessionPlan, SessionSizes, UserBucket, plan_sessions
from mmrf_jax.data.readers.engine.candidates import mix, read_pool
from mmrf_jax.data.readers.engine.tasks import Engine, publish_array, publish_json
from mmrf_jax.data.readers.frame import build, catalogue, cells, columns, datetimes, features, fit, requests, tables
from mmrf_jax.data.readers.frame.columns import ROW
from mmrf_jax.data.readers.frame.notes import Notes
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.io.progress import Counter, counted
from mmrf_jax.schema import OPTIONAL, Schema

#: Rows of a chunk and of a bucket; candidate lists make rows several times as large.
ROWS, ROWS_WITH_LISTS = 1 << 20, 1 << 17
_PROBES = 16  # places of a long log from which units are inferred
_BUCKET = "__bucket"
_LISTS = "lists.arrow"


@dataclasses.dataclass(frozen=True)
class FrameJob(tasks.TaskJob):
    """A log to prepare.

    Attributes:
      log: the table.
      schema: with units.
      work: folder of all outputs, the same for all processes.
      rows: of a chunk, and of a bucket on average. They determine the memory of a task.
    """

    log: tables.TablePieces
    schema: Schema
    work: pathlib.Path
    rows: int

    @property
    def chunks(self) -> int:
        return math.ceil(self.log.rows / self.rows)

    @property
    def buckets(self) -> int:
        return max(1, round(self.log.rows / self.rows))


def run_stages(
    given: Mapping[str, tables.Table],
    schema: Schema,
    work: pathlib.Path,
    engine: Engine,
    progress: Counter,
    rows: int | None = None,
) -> pathlib.Path:
    """Run the tasks that have not run before; return the folder with the finished log (`frame_log.SessionLog.open`).

    Args:
      given: the tables `log`, `items`, `users` and `candidates`; None for none.
      schema: what the columns of the log mean.
      work: folder to work in; with the outputs of earlier tasks, these must be of the same tables and schema.
      engine: runs the tasks.
      progress: as `io.progress.counted`.
      rows: of a chunk and of a bucket; None for `ROWS` or `ROWS_WITH_LISTS`.

    Raises:
      ValueError: for a table that does not fit the schema.
    """
    notes = Notes()
    roles = schema.columns()
    needed = {role: column for role, column in roles.items() if role not in ("duration", "candidates")}
    log = tables.table_pieces(given["log"], "log", roles.values(), needed, work / "log.arrow")
    if not log.rows:
        raise ValueError("the log has no rows; give at least a few sessions")
    items = None if given["items"] is None else tables.read_table(given["items"], "item table")
    users = None if given["users"] is None else tables.read_table(given["users"], "user table")
    lists = given["candidates"] is not None
    _check_optional(log.names, items, schema, lists)
    resolved = columns.resolve_units(_probe(log), schema, notes)
    if lists and not (work / _LISTS).exists():
        made = _lists_of(tables.read_table(given["candidates"], "candidate table"), schema)
        tasks.write_run(made, work / _LISTS)
    rows = rows or (ROWS_WITH_LISTS if lists or schema.candidates in log.names else ROWS)
    job = FrameJob(log, resolved, work, rows)
    if not (work / "ordered").exists():
        tasks.run_stage(job, engine, progress, "sort", sort_chunk, job.chunks)
        publish_array(work / "buckets.npy", np.array([made["bounds"] for made in job.read_all("sort")]))
        tasks.run_stage(job, engine, progress, "order", order_bucket, job.buckets)
        if schema.request and job.buckets > 1:
            job.cut("request_parts", "requests", "key", rows)
            tasks.run_stage(job, engine, progress, "check", check_requests, job.parts("request_parts"))
        (work / "ordered").touch()
    for done in (*job.read_all("sort"), *job.read_all("order")):
        notes.add(done["notes"])
    for path in (*job.made("sort"), *job.made("requests")):
        path.unlink()
    found = fit.fit_log(job, items, users, notes)
    tasks.run_stage(job, engine, progress, "write", write_bucket, job.buckets)
    return fit.finish_log(job, schema, found, notes)


def _probe(log: tables.TablePieces) -> pl.DataFrame:
    """Return the whole log, or `ROWS` rows of a long one, spread evenly."""
    if log.rows <= ROWS:
        return log.read(0, log.rows)
    size = ROWS // _PROBES
    starts = [(log.rows - size) * i // (_PROBES - 1) for i in range(_PROBES)]
    return pl.concat([log.read(start, size) for start in starts])


def _check_optional(names: tuple[str, ...], items: pl.DataFrame | None, schema: Schema, lists: bool) -> None:
    """Raise ValueError for named columns that no table has."""
    there = [*names, *([] if items is None else items.columns)]
    named = {role: getattr(schema, role) for role in OPTIONAL if getattr(schema, role)}
    if lists:
        named.pop("candidates", None)
    for role in ("author", "tag", "available"):
        if column := getattr(schema, role):
            if items is None:
                raise ValueError(
                    f"schema.{role}={column!r} is a column of the item table, which is not given; give one"
                )
            tables.check_names(items.columns, {role: column}, "item table")
    tables.check_names(there, named, "log")
    if lists and not schema.request:
        raise ValueError("a table of candidates needs schema.request, the column that joins it to the log; name it")


def _lists_of(table: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """Return `request` and `candidates` of a table with a list column, or with one row per candidate."""
    name = schema.candidates or schema.item
    needed = {"request": str(schema.request), "candidates" if schema.candidates else "item": name}
    tables.check_names(table.columns, needed, "candidate table")
    request = cells.to_ids(table[str(schema.request)]).rename("request")
    if isinstance(table[name].dtype, pl.List | pl.Array) or (
        table[name].dtype == pl.String and str(table[name].drop_nulls().head(1).item() or "").startswith("[")
    ):
        lists = cells.to_id_lists(table[name])
    else:
        lists = cells.to_ids(table[name])
    long = pl.DataFrame({"request": request, "candidates": lists.rename("candidates")})
    if not isinstance(lists.dtype, pl.List):
        return long.group_by("request", maintain_order=True).agg("candidates")
    if (repeated := long["request"].is_duplicated()).any():
        value = cells.first_wrong(long["request"], repeated)
        raise ValueError(
            f"column {schema.request!r} of the candidate table has {value} twice; keep one list per request"
        )
    return long


def sort_chunk(job: FrameJob, task: int) -> None:
    """Write the usable rows of a chunk as a run, by the bucket of their users."""
    notes, start = Notes(), task * job.rows
    frame = columns.usable_rows(job.log.read(start, job.rows), job.schema, notes, start)
    if (job.work / _LISTS).exists():
        frame = _with_lists(frame, job)
    bucket = bucket_of(frame["user"], job.buckets)
    frame = frame.with_columns(pl.Series(_BUCKET, bucket))
    if job.buckets > 1:
        frame = frame.sort(_BUCKET, maintain_order=True)
    tasks.write_run(frame, job.path("sort", task))
    bounds = np.searchsorted(np.sort(bucket), np.arange(job.buckets + 1)).tolist()
    publish_json(job.path("sort", task, "json"), {"notes": dataclasses.asdict(notes), "bounds": bounds})


def _with_lists(frame: pl.DataFrame, job: FrameJob) -> pl.DataFrame:
    """Add the candidate lists of the second table."""
    every = pl.scan_ipc(job.work / _LISTS, glob=False)
    if (there := every.collect_schema()["request"]) != frame["request"].dtype:
        raise ValueError(
            f"column {job.schema.request!r} has type {frame['request'].dtype} in the log and {there} in the candidate "
            "table; use one type"
        )
    mine = every.join(frame.lazy().select("request").unique(), "request", "semi").collect()
    return frame.drop("candidates", strict=False).join(mine, "request", "left", maintain_order="left")


def bucket_of(ids: pl.Series, buckets: int) -> np.ndarray:
    """Return the bucket [n] int32 of ids, by a hash that no version of a library changes."""
    if buckets == 1:
        return np.zeros(len(ids), np.int32)
    return ((_hash(ids) >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int32)


def _hash(ids: pl.Series) -> np.ndarray:
    """Return hashes [n] uint64 of ids."""
    if ids.dtype != pl.String:
        return mix(ids.to_numpy().astype(np.uint64))
    different = ids.unique()
    hashes = pl.Series([zlib.crc32(text.encode()) for text in different], dtype=pl.UInt64)
    pairs = pl.DataFrame({"id": different, "hash": hashes})
    return mix(ids.to_frame("id").join(pairs, "id", "left", maintain_order="left")["hash"].to_numpy())


def order_bucket(job: FrameJob, task: int) -> None:
    """Write a bucket's rows in the order of users, requests and places, with facts about them."""
    schema, notes = job.schema, Notes()
    frame = tasks.read_part(job.made("sort"), job.cuts("buckets"), task).drop(_BUCKET)
    frame = requests.order_rows(columns.without_repeated(frame, notes), schema, notes)
    frame = frame.with_columns(pl.Series("day", datetimes.days_of(frame["asked"].to_numpy(), schema.time_zone)))
    fitted_on = frame.filter(~pl.col("random")) if schema.random else frame
    times, days = fitted_on["asked"].to_numpy(), fitted_on.group_by("day").agg(pl.len(), pl.col("asked").max()).rows()
    frame = requests.limit_slates(frame, schema, notes)
    folders = ("times", "rows", "items", "users", "listed", "context", "requests")
    for folder in folders:
        (job.work / folder).mkdir(exist_ok=True)
    publish_array(job.path("times", task, "npy"), np.sort(times))
    of_each = [pl.col(name).filter(~pl.col("random")) if schema.random else pl.col(name) for name in ("asked", "day")]
    first = [column.min() for column in of_each]
    of_items = [*first, pl.col("day").min().alias("live")]
    of_items += [pl.col("duration").max()] if "duration" in frame.columns else []
    tasks.write_run(frame.group_by("item").agg(of_items), job.path("items", task))
    tasks.write_run(frame.group_by("user").agg(first), job.path("users", task))
    longest, empty = 0, frame["propensity"].null_count() if schema.propensity else 0
    if "candidates" in frame.columns:
        lists = frame["candidates"].filter(pl.Series(requests.starts_of_requests(frame, schema)))
        longest = int(lists.list.len().max() or 0)  # type: ignore[arg-type]
        listed = frame["candidates"].explode(empty_as_null=False, keep_nulls=False).drop_nulls().unique()
        tasks.write_run(listed.to_frame("id"), job.path("listed", task))
    if schema.context:
        some = fitted_on.select("asked", "day", "^c[0-9]+$").gather_every(max(1, math.ceil(job.log.rows / ROWS)))
        tasks.write_run(some, job.path("context", task))
    if schema.request and job.buckets > 1:
        of_requests = frame.group_by("request").agg(
            pl.col(ROW).first().alias("first"), pl.col(ROW).last().alias("last")
        )
        key = pl.Series("key", (_hash(of_requests["request"]) >> np.uint64(1)).astype(np.int64))
        tasks.write_run(of_requests.with_columns(key).sort("key"), job.path("requests", task))
    if empty:
        notes.count("propensities are empty: the behaviour policy is fitted", empty, len(frame))
    tasks.write_run(frame, job.path("rows", task))
    made = {
        "rows": len(frame),
        "days": days,
        "extent": requests.slate_extent(frame, schema) if len(frame) else None,
        "longest": longest,
        "propensities": bool(schema.propensity) and not empty,
        "notes": dataclasses.asdict(notes),
    }
    publish_json(job.path("order", task, "json"), made)


def check_requests(job: FrameJob, task: int) -> None:
    """Raise ValueError for a request id that users of several buckets have."""
    part = tasks.read_part(job.made("requests"), job.cuts("request_parts"), task)
    edges = pl.col("first").min(), pl.col("last").max()
    requests.check_users(part.group_by("request").agg(pl.len().alias("users"), *edges), job.schema)
    publish_json(job.path("check", task, "json"), {})


def write_bucket(job: FrameJob, task: int) -> None:
    """Write the shards of a bucket's users, one per part of the log, and their counts."""
    fitted, schema, notes = job.read("fitted.json"), job.schema, Notes()
    spec = InputSpec.from_dict(fitted["spec"])
    split = requests.SplitRule(fitted["split"]["by"], tuple(fitted["split"]["bounds"]))
    frame = pl.scan_ipc(job.path("rows", task), glob=False).collect()
    made: dict[str, Any] = {"parts": {}, "signals": []}
    bucket: UserBucket | None = None
    plans: dict[str, SessionPlan] = {}
    if len(frame):
        rows = requests.arrange_rows(
            frame,
            catalogue.find_rows(frame["user"], job.work / "user_ids"),
            catalogue.find_rows(frame["item"], job.work / "item_ids"),
            schema,
        )
        part, parts = split.of(rows.time, rows.day), fitted["last"]
        sizes = SessionSizes(
            spec.candidates, spec.slate, schema.history, schema.session_gap, schema.request_gap or schema.session_gap
        )
        plans = {name: plan_sessions(rows, name, part, sizes, end) for name, end in parts.items()}
        lookup = build.FrameLookup(
            rows,
            sizes.candidates,
            read_pool(job.work / "pool"),
            frame,
            frame["propensity"].to_numpy() if fitted["propensities"] else None,
            _lists_in(frame, plans, job),
            np.load(job.work / "profiles.npy", mmap_mode="r"),
            [features.ColumnEncoder(**values) for values in fitted["context"]],
            schema,
            notes,
        )
        bucket = UserBucket(rows, sizes, lookup)
        made["signals"] = fit.describe_signals(rows.feedback, (part == 0) & ~rows.random)
    for name in fitted["last"]:
        path = job.work / "made" / name / shards.shard_name(task, job.buckets)
        made["parts"][name] = shards.write_shard(path, bucket, plans.get(name), spec)
    publish_json(job.path("write", task, "json"), made | {"notes": dataclasses.asdict(notes)})


def _lists_in(frame: pl.DataFrame, plans: Mapping[str, SessionPlan], job: FrameJob) -> build.Lists | None:
    """Return the candidate lists at the starts of requests, with the item rows."""
    if "candidates" not in frame.columns:
        return None
    start = np.zeros(len(frame), bool)
    for of in plans.values():
        start[of.own[of.request_first[:-1]]] = True
    lists = pl.select(pl.when(pl.Series(start)).then(frame["candidates"])).to_series()
    flat = lists.explode(empty_as_null=False, keep_nulls=False)
    lengths = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
    return build.Lists(
        catalogue.find_rows(flat, job.work / "item_ids"), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    )


def prepare_frame_log(
    given: Mapping[str, tables.Table],
    schema: Schema,
    folder: pathlib.Path,
    engine: Engine | None = None,
    progress: Counter = counted,
    rows: int | None = None,
) -> None:
    """Prepare a log in a new folder, which appears complete or not at all.

    After a stop, the same call with the same files runs the missing tasks. Arguments and errors are those of
    `run_stages`; without an engine, `tasks.worker_processes()` run the tasks.
    """
    key = frame_log.log_key(given, schema)
    tasks.make_folder(folder, key, engine, lambda work, engine: run_stages(given, schema, work, engine, progress, rows))
