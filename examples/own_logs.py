"""From a shop's log to a ranked slate: string ids, Parquet, three signals, propensities, candidates, content vectors.

python examples/own_logs.py
"""

import tempfile
from pathlib import Path

import numpy as np
import polars as pl

import mmrf_jax as mmrf
from mmrf_jax import Schema, Signal

ITEMS, USERS, SESSIONS, PAGES, SHOWN, CANDIDATES = 200, 150, 400, 3, 4, 16


def write_tables(folder: Path) -> None:
    """Write log.parquet and items.parquet, as a shop might have them."""
    rng = np.random.default_rng(0)
    vectors, taste = rng.normal(size=(ITEMS, 8)), rng.normal(size=(USERS, 8))
    start, rows = np.datetime64("2024-05-01T00:00:00"), []
    users, minutes = rng.integers(USERS, size=SESSIONS), np.sort(rng.integers(0, 14 * 24 * 60, SESSIONS))
    for page in range(SESSIONS * PAGES):
        user, minute = users[page // PAGES], minutes[page // PAGES] + page % PAGES
        listed = rng.choice(ITEMS, CANDIDATES, replace=False)
        for rank in range(SHOWN):  # the shop chooses uniformly
            liking = 1 / (1 + np.exp(2 - taste[user] @ vectors[listed[rank]]))
            rows.append(
                {
                    "visitor": f"visitor-{user}",
                    "sku": f"sku-{listed[rank]}",
                    "shown_at": (start + np.timedelta64(int(minute), "m")).astype(str) + "Z",
                    "page": f"page-{page}",
                    "rank": rank,
                    "probability": 1 / (CANDIDATES - rank),
                    "choices": [f"sku-{i}" for i in listed],
                    "click": bool(rng.random() < liking),
                    "purchase": bool(rng.random() < 0.3 * liking),
                    "dwell_ms": int(rng.gamma(2.0, 10_000 * liking)),
                }
            )
    pl.DataFrame(rows).write_parquet(folder / "log.parquet")
    items = {"sku": [f"sku-{i}" for i in range(ITEMS)], "content": vectors.tolist()}
    items |= {"brand": [f"brand-{i % 20}" for i in range(ITEMS)], "price": rng.lognormal(3, 1, ITEMS).round(2)}
    pl.DataFrame(items).write_parquet(folder / "items.parquet")


folder = Path(tempfile.mkdtemp())
write_tables(folder)

schema = Schema(
    user="visitor",
    item="sku",
    time="shown_at",
    request="page",
    position="rank",
    propensity="probability",
    candidates="choices",
    signals=[Signal("click"), Signal("purchase", weight=3.0), Signal("dwell", "dwell_ms", "duration", unit="ms")],
    main="dwell",
    author="brand",
)
log = mmrf.SessionLog.from_frame(folder / "log.parquet", schema, items=folder / "items.parquet")
run = mmrf.train("logs", workdir=folder / "run", log=log, overrides={"quick": True})
clicks = run.results["offline"]["click"]
print(f"GAUC of clicks: {clicks['gauc']}, of {clicks['eligible_users']} users (it needs 200)")
print("slate:", run.rank(user="visitor-7", candidates=["sku-3", "sku-14", "sku-15", "sku-92", "sku-65"], k=3))
