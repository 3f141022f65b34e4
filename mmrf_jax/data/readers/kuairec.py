"""KuaiRec: short videos and their watch ratios, as in the folder `data` of the release.

`small_matrix.csv` is almost fully observed (1,411 users and 3,327 videos), `big_matrix.csv` is the usual log. Only what
was watched is in it, so requests and candidates are reconstructed. `item_daily_features.csv` is not read: its counts
cover the days that are predicted.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.data.readers.frame import tables
from mmrf_jax.io import copies, storage
from mmrf_jax.schema import Schema
from mmrf_jax.signals import Signal

_LOG = ("user_id", "video_id", "play_duration", "video_duration", "timestamp", "watch_ratio")


def load(folder: str | Path, matrix: str = "big_matrix", quiet: bool = False) -> SessionLog:
    """Load a matrix, with signals `finish` (watched to the end) and `watch_time`, the main one.

    Raises:
      ValueError: if the files are missing or have another layout.
    """
    root = copies.local(storage.path(folder))
    root = root / "data" if (root / "data").is_dir() else root
    log = tables.scan_table(root / f"{matrix}.csv", "log", _LOG, {name: name for name in _LOG})
    log = log.with_columns(finish=pl.col("watch_ratio") >= 1.0)
    items = tables.read_table(root / "item_categories.csv", "item table", needed={"item": "video_id", "tags": "feat"})
    items = items.with_columns(pl.col("feat").str.strip_chars("[]").str.replace_all(" ", "").str.split(","))
    users = tables.read_table(root / "user_features.csv", "user table", needed={"user": "user_id"})
    schema = Schema(
        user="user_id",
        item="video_id",
        time="timestamp",
        duration="video_duration",
        duration_unit="ms",
        signals=[Signal("finish"), Signal("watch_time", column="play_duration", kind="duration", unit="ms")],
        main="watch_time",
        time_unit="s",
        time_zone="Asia/Shanghai",
        tag="feat",
    )
    return SessionLog.from_frame(log, schema, items=items, users=users, quiet=quiet)
