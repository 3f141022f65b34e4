"""Open Bandit: a fashion shop's recommendation slots, with the true propensities of two logging policies.

Layout (Saito et al., NeurIPS Datasets and Benchmarks 2021): POLICY/CAMPAIGN/CAMPAIGN.csv and item_context.csv, POLICY
`random` or `bts`, CAMPAIGN `all`, `men` or `women`. A row is a request of one slot. There are no user ids: each row is
a user, with four hashed features; the 80 user-item affinities are not read.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.data.readers.frame import tables
from mmrf_jax.io import copies, storage
from mmrf_jax.schema import Schema
from mmrf_jax.signals import Signal

_USER = [f"user_feature_{i}" for i in range(4)]
_LOG = ("timestamp", "item_id", "click", "propensity_score", *_USER)


def load(folder: str | Path, policy: str = "bts", campaign: str = "all", quiet: bool = False) -> SessionLog:
    """Load the log of one policy and campaign.

    Raises:
      ValueError: if the files are missing or have another layout.
    """
    place = copies.local(storage.path(folder)) / policy / campaign
    packed = place / f"{campaign}.csv.gz"
    path = packed if packed.exists() else place / f"{campaign}.csv"
    log = tables.scan_table(path, "log", _LOG, {name: name for name in _LOG}).with_row_index("user_id")
    items = tables.read_table(place / "item_context.csv", "item table").select(pl.col("item_id", "^item_feature_.*$"))
    schema = Schema(
        user="user_id",
        item="item_id",
        time="timestamp",
        request="request_id",
        propensity="propensity_score",
        signals=[Signal("click")],
        time_zone="Asia/Tokyo",
        slate_size=1,
        num_candidates=len(items),
    )
    users = log.select("user_id", *_USER)
    return SessionLog.from_frame(log.with_columns(request_id="user_id"), schema, items=items, users=users, quiet=quiet)
