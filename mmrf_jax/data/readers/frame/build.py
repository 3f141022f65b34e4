"""A table of shown items as training, validation and test sessions, with items, users and a report."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import polars as pl

from mmrf_jax.data import sessions
from mmrf_jax.data.frame_log import FrameLog
from mmrf_jax.data.readers.frame import catalogue, columns, requests, sampling, tables
from mmrf_jax.data.readers.frame.columns import Notes
from mmrf_jax.data.readers.kuairand.requests import HOUR_MS, MAX_HOURS, MINUTE_MS
from mmrf_jax.data.session_log import InputSpec, SessionLog
from mmrf_jax.data.splits import SPLITS
from mmrf_jax.schema import OPTIONAL, Schema

CONTEXT = 4


def from_frame(
    log: tables.Table,
    schema: Schema,
    items: tables.Table | None = None,
    users: tables.Table | None = None,
    candidates: tables.Table | None = None,
) -> FrameLog:
    """Build a log; see `FrameLog.from_frame`."""
    notes = Notes()
    roles = schema.columns()
    needed = {role: column for role, column in roles.items() if role not in ("duration", "candidates")}
    frame = tables.read(log, "log", roles.values(), needed)
    if not (rows := len(frame)):
        raise ValueError("the log has no rows; give at least a few sessions")
    known = None if items is None else tables.read(items, "item table")
    people = None if users is None else tables.read(users, "user table")
    _check_optional(frame, known, schema, candidates is not None)
    frame = columns.clean(frame, schema, notes)
    if candidates is not None:
        frame = _with_lists(frame, tables.read(candidates, "candidate table"), schema)
    if not len(frame):
        raise ValueError(f"none of the {rows:,} rows of the log can be used: {notes.left_out}; see the schema")
    frame = requests.order(frame, schema, notes)
    item_table, item_ids = catalogue.read_table(known, schema.item, frame["item"], "item", notes, _listed(frame))
    user_table, user_ids = catalogue.read_table(people, schema.user, frame["user"], "user", notes)
    asked = frame["asked"].to_numpy()
    split = requests.cut(asked, columns.days(asked, schema.time_zone), schema)
    slate = requests.largest(frame, schema, notes)
    item, user = catalogue.rows_of(frame["item"], item_ids), catalogue.rows_of(frame["user"], user_ids)
    shown = requests.assemble(frame, user, item, split, slate, schema, notes)
    _check_positives(shown, schema)
    made, item_encoders = catalogue.build_items(item_table, item_ids, shown, schema, notes)
    trained = np.unique(shown.user[shown.split == 0])
    profiles, user_encoders = catalogue.build_profiles(user_table, user_ids, trained, schema, notes)
    whole, count = _sessions(shown, item_ids, profiles, slate, schema, notes)
    parts = _split(whole, shown)
    repeated = len(np.unique(parts["train"].user_id)) < parts["train"].num_sessions
    spec = InputSpec(
        num_videos=len(item_ids),
        num_authors=made.num_authors,
        num_tags=made.num_tags,
        num_users=len(user_ids) if repeated else 0,
        item_features=made.features.shape[1],
        profile=profiles.shape[1],
        context=CONTEXT,
        candidates=count,
        slate=slate,
        history=schema.history,
        signals=schema.as_signals(),
    )
    report = _report(rows, len(user_ids) - 1, shown, parts, spec, schema, notes)
    encoders = {"items": item_encoders, "users": user_encoders}
    fitted = {name: [dataclasses.asdict(encoder) for encoder in of] for name, of in encoders.items()}
    found = FrameLog(schema, spec, made, item_ids, user_ids, profiles, parts, fitted, report)
    for part in parts.values():
        part.validate(spec)
    return found


def _check_optional(frame: pl.DataFrame, items: pl.DataFrame | None, schema: Schema, lists: bool) -> None:
    """Raise ValueError for named columns that no table has."""
    there = [*frame.columns, *([] if items is None else items.columns)]
    named = {role: getattr(schema, role) for role in OPTIONAL if getattr(schema, role)}
    if lists:
        named.pop("candidates", None)
    tables.check_names(there, named, "log")
    for role in ("author", "tag"):
        if column := getattr(schema, role):
            tables.check_names([] if items is None else items.columns, {role: column}, "item table")
    if lists and not schema.request:
        raise ValueError("a table of candidates needs schema.request, the column that joins it to the log; name it")


def _with_lists(frame: pl.DataFrame, table: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """Add the candidate lists of a second table: a list column, or one row per candidate."""
    name = schema.candidates or schema.item
    needed = {"request": str(schema.request), "candidates" if schema.candidates else "item": name}
    tables.check_names(table.columns, needed, "candidate table")
    request = columns.ids(table[str(schema.request)]).rename("request")
    if isinstance(table[name].dtype, pl.List | pl.Array) or (
        table[name].dtype == pl.String and str(table[name].drop_nulls().head(1).item() or "").startswith("[")
    ):
        lists = columns.id_lists(table[name])
    else:
        lists = columns.ids(table[name])
    long = pl.DataFrame({"request": request, "candidates": lists.rename("candidates")})
    if not isinstance(lists.dtype, pl.List):
        long = long.group_by("request", maintain_order=True).agg("candidates")
    elif (repeated := long["request"].is_duplicated()).any():
        value = columns.first(long["request"], repeated)
        raise ValueError(f"column {schema.request!r} of the candidate table has {value} twice; keep one list a request")
    try:
        return frame.drop("candidates", strict=False).join(long, "request", "left", maintain_order="left")
    except pl.exceptions.PolarsError as error:
        raise ValueError(
            f"column {schema.request!r} has type {frame['request'].dtype} in the log and {request.dtype} in the "
            "candidate table; use one type"
        ) from error


def _listed(frame: pl.DataFrame) -> pl.Series | None:
    return frame["candidates"] if "candidates" in frame.columns else None


def _check_positives(rows: requests.Rows, schema: Schema) -> None:
    """Raise ValueError for a signal that is the same in all training rows."""
    for i, signal in enumerate(schema.signals):
        values = rows.feedback[rows.split == 0, i]
        if (values == values[0]).all():
            which = "not a single positive" if values[0] == 0 else f"only the value {values[0]:g}"
            raise ValueError(
                f"column {signal.column or signal.name!r} of signal {signal.name!r} has {which} in the {len(values):,} "
                "rows of training; leave it out of schema.signals, or use more days"
            )


def _sessions(
    rows: requests.Rows,
    item_ids: np.ndarray,
    profiles: np.ndarray,
    slate: int,
    schema: Schema,
    notes: Notes,
) -> tuple[SessionLog, int]:
    """Return all sessions, in the order of users and time, and C."""
    first = np.flatnonzero(rows.request_start)  # row of each request
    end = np.append(first[1:], len(rows))
    start = np.flatnonzero(rows.session_start[first])  # request of each session
    offsets = np.append(start, len(first)).astype(np.int64)
    exposure = first[:, None] + np.arange(slate)
    shown = exposure < end[:, None]
    exposure = np.where(shown, exposure, first[:, None])
    exposed = np.where(shown, rows.item[exposure], -1).astype(np.int32)
    feedback = np.where(shown[..., None], rows.feedback[exposure], 0.0).astype(np.float32)
    day = columns.days(rows.time, schema.time_zone)
    candidates, chosen = _candidates(rows, first, exposed, day, item_ids, schema, notes)
    count = candidates.shape[1]
    log_propensity, scores = np.full(len(first), np.nan, np.float32), None
    if rows.propensity is not None:
        each = np.where(shown, rows.propensity[exposure], 1.0)
        log_propensity = np.log(each).sum(axis=1).astype(np.float32)
        scores = sampling.scores_of(each, chosen, count)
    elif not schema.propensity:
        notes.assumed.append("no propensities are logged: the behaviour policy is fitted where one is needed")
    begin = first[start]
    history = _history(rows, begin, schema.history)
    terminated = _terminated(rows, offsets, first, end, schema)
    position = np.arange(len(first)) - np.repeat(start, np.diff(offsets))
    log = SessionLog(
        user_id=rows.user[begin],
        date=day[begin],
        profile=profiles[rows.user[begin]],
        **history,
        terminated=terminated,
        truncated=~terminated,
        offsets=offsets,
        context=_context(rows, first, position, schema),
        candidates=candidates,
        slate=chosen,
        feedback=feedback,
        log_propensity=log_propensity,
        scores=scores,
    )
    return log, count


def _candidates(
    rows: requests.Rows,
    first: np.ndarray,
    exposed: np.ndarray,
    day: np.ndarray,
    item_ids: np.ndarray,
    schema: Schema,
    notes: Notes,
) -> tuple[np.ndarray, np.ndarray]:
    """Return candidates [r, C] and slates [r, K] of the requests that start at rows `first` [r]."""
    lists = _listed(rows.frame)
    lists = None if lists is None else lists.gather(first)
    count = sampling.number(lists, len(item_ids) - 1, exposed.shape[1], schema, notes)
    pool = sampling.available(rows.item, day, len(item_ids), count)
    key = sampling.keys(exposed, rows.user[first], rows.time[first])
    sampled = pool.sample(key, day[first], exposed, count)
    if lists is not None:
        flat, lengths = _checked(lists, exposed, rows.frame[columns.ROW].gather(first), item_ids, schema)
        sampling.note_lengths(lengths, count, notes)
        return sampling.listed(flat, lengths, exposed, sampled[0], key)
    notes.assumed.append(
        f"no candidates are logged: each request has its shown items and others, up to {count}, drawn at random from "
        "the items shown until the same day"
    )
    return sampled


def _checked(
    lists: pl.Series, exposed: np.ndarray, row: pl.Series, item_ids: np.ndarray, schema: Schema
) -> tuple[np.ndarray, np.ndarray]:
    """Return the item rows of candidate lists, one after another, and their lengths [r].

    Raises:
      ValueError: for a list without a shown item.
    """
    lengths = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
    flat = catalogue.rows_of(lists.explode(empty_as_null=False, keep_nulls=False), item_ids)
    request = np.repeat(np.arange(len(lengths)), lengths)
    has = np.isin(
        np.arange(len(exposed))[:, None] * len(item_ids) + exposed, request * len(item_ids) + flat.astype(np.int64)
    )
    lacking = (exposed >= 0) & ~has & (lengths > 0)[:, None]
    if lacking.any():
        at, slot = (int(x[0]) for x in np.nonzero(lacking))
        raise ValueError(
            f"column {schema.candidates!r} lacks the shown item {item_ids[exposed[at, slot]]!s} of the request in row "
            f"{row[at]} ({int(lacking.any(axis=1).sum()):,} such requests); candidates are all items that could be "
            "shown, with those that were"
        )
    return flat, lengths


def _history(rows: requests.Rows, begin: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Return the history fields before the rows `begin` [n] of sessions."""
    own = np.flatnonzero(np.append(True, rows.user[1:] != rows.user[:-1]))
    earliest = own[np.searchsorted(own, begin, side="right") - 1]
    index = begin[:, None] + np.arange(-length, 0)
    mask = index >= earliest[:, None]
    index = np.where(mask, index, 0)
    return {
        "history_videos": np.where(mask, rows.item[index], 0).astype(np.int32),
        "history_feedback": np.where(mask[..., None], rows.feedback[index], 0.0).astype(np.float32),
        "history_mask": mask,
    }


def _terminated(
    rows: requests.Rows, offsets: np.ndarray, first: np.ndarray, end: np.ndarray, schema: Schema
) -> np.ndarray:
    """Return whether each session [n] ended: the user came back later, or the part goes on for longer than the gap.

    Only rows of the session's own part of the log decide, so training does not depend on later days.
    """
    last = end[offsets[1:] - 1] - 1  # last row of each session
    ended = rows.frame["ended"].to_numpy()[last]
    returns = np.zeros(len(last), bool)
    returns[:-1] = (rows.user[last[:-1]] == rows.user[last[:-1] + 1]) & (
        rows.split[last[:-1]] == rows.split[last[:-1] + 1]
    )
    final = np.array([rows.time[rows.split == i].max(initial=0) for i in range(len(SPLITS))])
    return returns | (final[rows.split[last]] - ended > schema.session_gap * MINUTE_MS)


def _context(rows: requests.Rows, first: np.ndarray, position: np.ndarray, schema: Schema) -> np.ndarray:
    """Return features [r, 4] of requests: sine and cosine of the hour, hours since the last item, log1p(position)."""
    time, user = rows.time[first], rows.user[first]
    before = np.maximum(first - 1, 0)
    known = (first > 0) & (rows.user[before] == user)
    hours = np.where(known, np.clip((time - rows.time[before]) / HOUR_MS, 0.0, MAX_HOURS), MAX_HOURS)
    angle = columns.hours(time, schema.time_zone) * (2 * np.pi / 24)
    away = np.log1p(hours) / np.log1p(MAX_HOURS)
    return np.stack([np.sin(angle), np.cos(angle), away, np.log1p(position)], axis=1).astype(np.float32)


def _split(log: SessionLog, rows: requests.Rows) -> dict[str, SessionLog]:
    of_session = rows.split[np.flatnonzero(rows.session_start)]
    return {name: sessions.select_sessions(log, of_session == i) for i, name in enumerate(SPLITS)}


def _report(
    number: int,
    users: int,
    rows: requests.Rows,
    parts: dict[str, SessionLog],
    spec: InputSpec,
    schema: Schema,
    notes: Notes,
) -> dict[str, Any]:
    """Return the log's report as plain values."""
    signals = {}
    for i, signal in enumerate(schema.signals):
        values = rows.feedback[:, i].astype(np.float64)
        signals[signal.name] = {
            "kind": signal.kind,
            "sign": signal.sign,
            "positive": int((values > 0).sum()),
            "mean": float(values.mean()),
            "largest": float(values.max()),
        }
    splits = {}
    for i, (name, part) in enumerate(parts.items()):
        time = rows.time[rows.split == i]
        when = (
            [str(np.datetime64(int(t), "ms").astype("datetime64[s]")) for t in (time.min(), time.max())]
            if len(time)
            else None
        )
        splits[name] = {
            "from_to_utc": when,
            "users": len(np.unique(part.user_id)),
            "sessions": part.num_sessions,
            "requests": part.num_requests,
            "rows": len(time),
        }
    return {
        "rows": number,
        "used": len(rows),
        "left_out": notes.left_out,
        "assumed": notes.assumed,
        "signals": signals,
        "main": schema.main,
        "splits": splits,
        "sizes": {
            "items": spec.num_videos - 1,
            "users": users,
            "item_features": spec.item_features,
            "user_features": spec.profile,
            "slate_size": spec.slate,
            "num_candidates": spec.candidates,
        },
        "propensities": "logged" if rows.propensity is not None else "fitted",
        "requests": "logged" if schema.request else "reconstructed",
    }
