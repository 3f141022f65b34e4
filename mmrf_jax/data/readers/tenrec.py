"""Tenrec: clicks, likes, follows and shares of videos, as in `QB-video.csv` or `QK-video.csv` of the release.

The release has no times; its rows are in the order of time for each user. Each user's rows are spread evenly over one
period, so that the first 80 % train, and a user has one session in each part of the log.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.data.readers.frame import tables
from mmrf_jax.schema import Schema
from mmrf_jax.signals import Signal

_SIGNALS = ("click", "follow", "like", "share")
_LOG = ("user_id", "item_id", *_SIGNALS, "video_category", "watching_times", "gender", "age")
_PERIOD_MS = 10 * 86_400_000


def load(path: str | Path, quiet: bool = False) -> SessionLog:
    """Load a file of Tenrec; `click` is the main signal, `watching_times` counts repeated plays.

    Raises:
      ValueError: if the file is missing or has another layout.
    """
    log = tables.read_table(path, "log", _LOG, {name: name for name in _LOG})
    place = pl.int_range(pl.len()).over("user_id") / pl.len().over("user_id")
    log = log.with_columns(time=(place * _PERIOD_MS).cast(pl.Int64).cast(pl.Datetime("ms", "UTC")))
    of_item, of_user = pl.col("video_category").cast(pl.String), pl.col("gender", "age").cast(pl.String)
    items = log.select("item_id", of_item).unique("item_id", keep="first", maintain_order=True)
    users = log.select("user_id", of_user).unique("user_id", keep="first", maintain_order=True)
    schema = Schema(
        user="user_id",
        item="item_id",
        time="time",
        signals=[*(Signal(name) for name in _SIGNALS), Signal("watching_times", kind="count")],
        main="click",
        session_gap=2 * _PERIOD_MS / 60_000,
        tag="video_category",
    )
    return SessionLog.from_frame(log, schema, items=items, users=users, quiet=quiet)
