"""The parts of a prepared log on disk: a shard of sessions per bucket of users, and a manifest (`data.records`)."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmrf_jax.data import records
from mmrf_jax.data.readers.engine.build import SessionPlan, UserBucket
from mmrf_jax.data.readers.engine.tasks import appearing
from mmrf_jax.data.session_log import InputSpec

#: Level 1 of zstd takes a third of the time of the default, for 7 % more bytes.
_OPTIONS = "group_size:1,zstd:1"
#: What is counted of a part.
COUNTS = ("users", "sessions", "requests", "exposures", "terminated")


def shard_name(shard: int, shards: int) -> str:
    """Return the file name of a shard."""
    return f"sessions-{shard:05d}-of-{shards:05d}.array_record"


def write_shard(
    path: pathlib.Path, bucket: UserBucket | None, plan: SessionPlan | None, spec: InputSpec
) -> dict[str, Any]:
    """Write the sessions of a plan as a shard; None for no rows at all.

    Returns:
      `COUNTS`, a `digest`, and `when`: the first and the last time of a row, or None.
    """
    digest, step = hashlib.sha256(), records.SESSIONS_PER_RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as temporary:
        writer = records.array_records().ArrayRecordWriter(str(temporary), _OPTIONS)
        if bucket is not None and plan is not None:
            for start in range(0, plan.num_sessions, step):
                log = bucket.gather(plan, np.arange(start, min(start + step, plan.num_sessions)))
                log.validate(spec)
                block = records.pack_sessions(log, spec)
                writer.write(block)
                digest.update(block)
        writer.close()
    return _counts(bucket, plan) | {"digest": digest.hexdigest()}


def _counts(bucket: UserBucket | None, plan: SessionPlan | None) -> dict[str, Any]:
    if bucket is None or plan is None:
        return {**dict.fromkeys(COUNTS, 0), "when": None}
    users, times = bucket.rows.user[plan.own], bucket.rows.time[plan.own]
    when = [int(times.min()), int(times.max())] if len(times) else None
    found = (
        int((np.diff(users) != 0).sum()) + (len(users) > 0),
        plan.num_sessions,
        len(plan.request_first) - 1,
        len(users),
        int(plan.terminated.sum()),
    )
    return {**dict(zip(COUNTS, found, strict=True)), "when": when}


def finish_part(
    folder: pathlib.Path, shards: Sequence[dict[str, Any]], spec: InputSpec, scores: bool
) -> dict[str, int]:
    """Write the manifest of a part and return its counts; `shards` are what `write_shard` returned, in order."""
    totals = {key: sum(shard[key] for shard in shards) for key in COUNTS}
    files = [
        {"name": shard_name(i, len(shards)), "sessions": shard["sessions"], "requests": shard["requests"]}
        for i, shard in enumerate(shards)
    ]
    for path in folder.glob(".*"):  # of tasks that were killed
        path.unlink()
    records.write_manifest(folder, spec, files, totals["exposures"], scores)
    return totals
