"""What is fitted on a whole log: where it is split, the tables of items and users, sizes; and its report."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mmrf_jax.data import frame_log
from mmrf_jax.data.readers.engine import shards
from mmrf_jax.data.readers.engine.tasks import publish_json
from mmrf_jax.data.readers.frame import catalogue, datetimes, features, requests, sampling
from mmrf_jax.data.readers.frame.build import CONTEXT
from mmrf_jax.data.readers.frame.notes import Notes
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.data.splits import RANDOM, SPLITS
from mmrf_jax.schema import Schema

if TYPE_CHECKING:
    from mmrf_jax.data.readers.frame.prepare import FrameJob


_LATEST = {"asked": 2**62, "day": 99991231}  # of items and users that were never shown but at random


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The results of `fit_log`.

    Attributes:
      spec: sizes; without users, see `finish_log`.
      items: the items, their encoders and vocabularies.
      item_ids, user_ids: [V], [U].
      profiles: [U, Du].
      user_encoders, context_encoders: of the users' features and of the context's columns.
    """

    spec: InputSpec
    items: catalogue.ItemTable
    item_ids: np.ndarray
    user_ids: np.ndarray
    profiles: np.ndarray
    user_encoders: list[features.ColumnEncoder]
    context_encoders: list[features.ColumnEncoder]


def fit_log(job: FrameJob, items: pl.DataFrame | None, users: pl.DataFrame | None, notes: Notes) -> Fitted:
    """Fit everything on the training part, from the facts of `order_bucket`; write what `write_bucket` reads.

    Raises:
      ValueError: for a log without usable rows, or one that cannot be split or ranked.
    """
    schema, made = job.schema, job.read_all("order")
    days = [day for of in made for day in of["days"]]
    _check_usable(job, any(of["rows"] for of in made), bool(days), notes)
    times = requests.SortedTimes([np.load(path, mmap_mode="r") for path in job.made("times", "npy")])
    split = requests.cut_parts(times, _rows_of_days(days), schema)
    by_item, by_user = (_facts(job, name) for name in ("item", "user"))
    item_table, item_ids = catalogue.table_with_ids(items, schema.item, by_item["item"], "item", notes, _listed(job))
    user_table, user_ids = catalogue.table_with_ids(users, schema.user, by_user["user"], "user", notes)
    slate = requests.largest_slate([of["extent"] for of in made if of["extent"]], schema, notes)
    trained_items, shown = _in_train(by_item, "item", item_ids, split)
    trained_users, _ = _in_train(by_user, "user", user_ids, split)
    seconds = np.zeros(len(item_ids), np.float32)
    if "duration" in by_item.columns:
        seconds[shown] = np.maximum(by_item["duration"].fill_null(0.0).to_numpy(), 0.0)
    table = catalogue.build_items(item_table, item_ids, seconds, trained_items, schema, notes)
    profiles, user_encoders = catalogue.build_profiles(user_table, user_ids, trained_users, schema, notes)
    count = sampling.choose_num_candidates(max(of["longest"] for of in made), len(item_ids) - 1, slate, schema, notes)
    since = np.zeros(len(item_ids), np.int32)
    if item_table is not None and schema.available:
        uploaded = datetimes.to_days(item_table[schema.available]).fill_null(0).to_numpy()
        since[catalogue.rows_of_ids(item_table[schema.item], item_ids)] = uploaded
    pool = sampling.available_pool(shown, by_item["live"].to_numpy(), since, count)
    context = _fit_context(job, split, notes)
    propensities = all(of["propensities"] for of in made if of["rows"])
    _note_missing(schema, bool(job.made("listed")), count, notes)
    spec = InputSpec(
        num_videos=len(item_ids),
        num_authors=table.items.num_authors,
        num_tags=table.items.num_tags,
        num_users=0,
        item_features=np.shape(table.items.features)[1],
        profile=profiles.shape[1],
        context=CONTEXT + sum(encoder.width for encoder in context),
        candidates=count,
        slate=slate,
        history=schema.history,
        signals=schema.as_signals(),
    )
    catalogue.save_ids(item_ids, job.work / "item_ids")
    catalogue.save_ids(user_ids, job.work / "user_ids")
    np.save(job.work / "profiles.npy", profiles)
    pool.save(job.work / "pool")
    publish_json(
        job.work / "fitted.json",
        {
            "spec": dataclasses.asdict(spec),
            "split": dataclasses.asdict(split),
            "last": _last_times(split, times, days) | dict.fromkeys(RANDOM if schema.random else (), 0),
            "propensities": propensities,
            "context": [dataclasses.asdict(encoder) for encoder in context],
        },
    )
    return Fitted(spec, table, item_ids, user_ids, profiles, user_encoders, context)


def _check_usable(job: FrameJob, some: bool, usual: bool, notes: Notes) -> None:
    """Raise ValueError for a log without usable rows, or with random ones alone."""
    if not some:
        raise ValueError(f"none of the {job.log.rows:,} rows of the log can be used: {notes.left_out}; see the schema")
    if not usual:
        raise ValueError(
            f"column {job.schema.random!r} (schema: random) is true in all rows, and nothing is fitted on such rows; "
            "leave schema.random out"
        )


def _rows_of_days(days: Sequence[tuple[int, int, int]]) -> dict[int, int]:
    """Return {day: rows} of (day, rows, last time)."""
    found: dict[int, int] = {}
    for day, rows, _ in days:
        found[day] = found.get(day, 0) + rows
    return found


def _facts(job: FrameJob, of: str) -> pl.DataFrame:
    """Return the facts of all buckets about items or users, one row each, in the order of their ids."""
    every = pl.concat([pl.scan_ipc(path, glob=False) for path in job.made(f"{of}s")])
    there = every.collect_schema().names()
    least = [pl.col(name).min() for name in ("asked", "day", "live") if name in there]
    least += [pl.col("duration").max()] if "duration" in there else []
    return every.group_by(of).agg(least).sort(of).collect(engine="streaming")


def _listed(job: FrameJob) -> pl.Series | None:
    """Return the different ids of all candidate lists; None for no lists."""
    if not job.made("listed"):
        return None
    every = pl.concat([pl.scan_ipc(path, glob=False) for path in job.made("listed")])
    return every.unique().collect(engine="streaming")["id"]


def _in_train(
    facts: pl.DataFrame, of: str, ids: np.ndarray, split: requests.SplitRule
) -> tuple[np.ndarray, np.ndarray]:
    """Return which ids [n] are in training, and the rows [m] of those of the facts."""
    rows = catalogue.rows_of_ids(facts[of], ids)
    out = np.zeros(len(ids), bool)
    out[rows] = split.of(*(facts[name].fill_null(_LATEST[name]).to_numpy() for name in ("asked", "day"))) == 0
    return out, rows


def _fit_context(job: FrameJob, split: requests.SplitRule, notes: Notes) -> list[features.ColumnEncoder]:
    """Return the encoders of the context's columns, fitted on about a million rows of the training part."""
    schema = job.schema
    if not schema.context:
        return []
    some = pl.concat([pl.scan_ipc(path, glob=False) for path in job.made("context")]).collect()
    in_train = split.of(some["asked"].to_numpy(), some["day"].to_numpy()) == 0
    named = some.rename({f"c{i}": name for i, name in enumerate(schema.context)})
    return features.fit_encoders(named, list(schema.context), in_train, notes, "context")


def _last_times(
    split: requests.SplitRule, times: requests.SortedTimes, days: Sequence[tuple[int, int, int]]
) -> dict[str, int]:
    """Return the last time of each part; 0 for an empty one. `days` are (day, rows, last time)."""
    if split.by == "time":
        edges = (times.first, *split.bounds, times.last + 1)
        last = [times.last_before(edge) for edge in edges[1:]]
        found = [0 if t is None or t < first else t for t, first in zip(last, edges[:-1], strict=True)]
        return dict(zip(SPLITS, found, strict=True))
    low, high = split.bounds
    parts = ([t for day, _, t in days if low_ < day <= high_] for low_, high_ in ((0, low), (low, high), (high, 2**31)))
    return {name: max(part, default=0) for name, part in zip(SPLITS, parts, strict=True)}


def _note_missing(schema: Schema, lists: bool, count: int, notes: Notes) -> None:
    if not lists:
        notes.assume(
            f"no candidates are logged: each request has its shown items and others, up to {count}, drawn at random "
            "from the items shown until the same day"
        )
    if schema.random:
        notes.assume(
            f"where {schema.random} is true, items were drawn uniformly: parts of their own, in no history, with "
            f"propensity 1/{count}"
        )
    if not schema.propensity:
        notes.assume("no propensities are logged: the behaviour policy is fitted where one is needed")


def describe_signals(feedback: np.ndarray, in_train: np.ndarray) -> list[dict[str, float | None]]:
    """Return counts of each signal of rows [n, S]; `low` and `high` of those in training [n], None if none is."""
    found = []
    for values in feedback.T:
        train = values[in_train]
        found.append(
            {
                "positive": int((values > 0).sum()),
                "sum": float(values.sum(dtype=np.float64)),
                "largest": float(values.max()),
                "low": float(train.min()) if len(train) else None,
                "high": float(train.max()) if len(train) else None,
            }
        )
    return found


def finish_log(job: FrameJob, schema: Schema, found: Fitted, notes: Notes) -> pathlib.Path:
    """Write all but the sessions to the folder of the log, which is then complete, and return it.

    Raises:
      ValueError: for a signal that is the same in all training rows.
    """
    made = job.read_all("write")
    for of in made:
        notes.add(of["notes"])
    parts = {name: [of["parts"][name] for of in made] for name in job.read("fitted.json")["last"]}
    signals = [of["signals"] for of in made if of["signals"]]
    _check_positives(signals, sum(of["exposures"] for of in parts["train"]), schema)
    repeated = sum(of["users"] - of["sessions"] for of in parts["train"]) < 0
    spec = dataclasses.replace(found.spec, num_users=len(found.user_ids) if repeated else 0)
    folder, scores = job.work / "made", job.read("fitted.json")["propensities"]
    digest = hashlib.sha256(repr(spec).encode())
    arrays = (found.item_ids, found.user_ids, found.profiles, *frame_log.arrays_of(found.items.items).values())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    totals = {name: shards.finish_part(folder / name, of, spec, scores) for name, of in parts.items()}
    for made_of in parts.values():
        digest.update("".join(of["digest"] for of in made_of).encode())
    encoders = {"items": found.items.encoders, "users": found.user_encoders, "context": found.context_encoders}
    log = frame_log.SessionLog(
        schema=schema,
        spec=spec,
        items=found.items.items,
        item_ids=found.item_ids,
        user_ids=found.user_ids,
        profiles=found.profiles,
        parts={},  # they are there
        vocabularies=found.items.vocabularies,
        encoders={name: [dataclasses.asdict(encoder) for encoder in of] for name, of in encoders.items()},
        report=_report(job, schema, found, parts, totals, signals, notes),
        folder=folder,
        _digest=digest.hexdigest()[:16],
    )
    frame_log.write_log_files(log)
    return folder


def _check_positives(signals: list[list[dict[str, Any]]], rows: int, schema: Schema) -> None:
    """Raise ValueError for a signal that is the same in all training rows."""
    for i, signal in enumerate(schema.signals):
        known = [of[i] for of in signals if of[i]["low"] is not None]
        low, high = min(of["low"] for of in known), max(of["high"] for of in known)
        if low == high:
            which = "not a single positive" if low == 0 else f"only the value {low:g}"
            raise ValueError(
                f"column {signal.column or signal.name!r} of signal {signal.name!r} has {which} in the {rows:,} "
                "rows of training; leave it out of schema.signals, or use more days"
            )


def _report(
    job: FrameJob,
    schema: Schema,
    found: Fitted,
    parts: dict[str, list[dict[str, Any]]],
    totals: dict[str, dict[str, int]],
    signals: list[list[dict[str, Any]]],
    notes: Notes,
) -> dict[str, Any]:
    """Return the log's report as plain values."""
    used = sum(of["exposures"] for of in totals.values())
    counted = {}
    for i, signal in enumerate(schema.signals):
        mine = [of[i] for of in signals]
        counted[signal.name] = {
            "kind": signal.kind,
            "sign": signal.sign,
            "positive": sum(of["positive"] for of in mine),
            "mean": sum(of["sum"] for of in mine) / used,
            "largest": max(of["largest"] for of in mine),
        }
    splits = {}
    for name, made in parts.items():
        edges = [of["when"] for of in made if of["when"]]
        when = (min(low for low, _ in edges), max(high for _, high in edges)) if edges else ()
        said = [str(np.datetime64(t, "ms").astype("datetime64[s]")) for t in when]
        counts = {key: totals[name][key] for key in ("users", "sessions", "requests")}
        splits[name] = {"from_to_utc": said or None} | counts | {"rows": totals[name]["exposures"]}
    return {
        "rows": job.log.rows,
        "used": used,
        "left_out": notes.left_out,
        "assumed": notes.lines(),
        "signals": counted,
        "main": schema.main,
        "splits": splits,
        "sizes": {
            "items": found.spec.num_videos - 1,
            "users": len(found.user_ids) - 1,
            "item_features": found.spec.item_features,
            "user_features": found.spec.profile,
            "slate_size": found.spec.slate,
            "num_candidates": found.spec.candidates,
        },
        "propensities": "logged" if job.read("fitted.json")["propensities"] else "fitted",
        "requests": "logged" if schema.request else "reconstructed",
    }
