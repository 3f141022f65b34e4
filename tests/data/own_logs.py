"""A made-up log that looks like no other: string ids, vectors, lists of candidates, propensities, gaps."""

import numpy as np
import polars as pl

from mmrf_jax.schema import Schema
from mmrf_jax.signals import Signal

START = 1_714_521_600_000  # 2024-05-01 00:00 UTC, ms


def make_items(rng: np.random.Generator, number: int = 60) -> pl.DataFrame:
    vectors = rng.normal(size=(number, 3))
    return pl.DataFrame(
        {
            "item_id": [f"i{n:03d}" for n in range(number)],
            "shop": [f"shop{n % 7}" for n in range(number)],
            "kind": [None if n % 11 == 0 else ["shoes", "hats", "bags"][n % 3] for n in range(number)],
            "price": rng.lognormal(3.0, 1.0, number).round(2),
            "colours": [["red", "blue", "green"][: n % 4] for n in range(number)],
            "vector": vectors.tolist(),
            "title": [f"a text of item {n}" for n in range(number)],
            "duration_ms": rng.integers(5_000, 60_000, number),
        }
    )


def make_users(number: int = 80) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user_id": [f"u{n}" for n in range(number)],
            "age": [None if n % 9 == 0 else 18 + n % 50 for n in range(number)],
            "country": [["de", "fr", "it"][n % 3] for n in range(number)],
        }
    )


def make_log(rows: int = 2_000, seed: int = 0, users: int = 80, items: int = 60) -> dict[str, pl.DataFrame]:
    """Return {"log", "items", "users"}: requests of 1 to 4 items out of 12 candidates over six days."""
    rng = np.random.default_rng(seed)
    catalogue = make_items(rng, items)
    taste = rng.normal(size=(users, 3))
    vectors = np.array(catalogue["vector"].to_list())
    out: dict[str, list] = {name: [] for name in ("user_id", "item_id", "ts", "req", "rank", "p", "candidates")}
    signals: dict[str, list] = {name: [] for name in ("liked", "taps", "reported", "watch_ms")}
    times, request, user, at = np.sort(rng.integers(0, 6 * 86_400, rows)), 0, 0, 0
    while len(out["ts"]) < rows:
        if rng.random() < 0.3:  # another session
            user, at = int(rng.integers(users)), int(times[len(out["ts"])])
        at += 60
        listed = rng.choice(items, 12, replace=False)
        for rank, item in enumerate(listed[: rng.integers(1, 5)]):
            liking = 1 / (1 + np.exp(-taste[user] @ vectors[item]))
            out["user_id"].append(f"u{user}")
            out["item_id"].append(f"i{item:03d}")
            out["ts"].append(START + 1_000 * at + rank)
            out["req"].append(f"r{request}")
            out["rank"].append(rank)
            out["p"].append(1 / (12 - rank))
            out["candidates"].append([f"i{i:03d}" for i in listed])
            signals["liked"].append(int(rng.random() < 0.6 * liking))
            signals["taps"].append(int(rng.poisson(liking)))
            signals["reported"].append(bool(rng.random() < 0.2 * (1 - liking)))
            signals["watch_ms"].append(int(rng.gamma(2.0, 8_000.0) * liking))
        request += 1
    log = pl.DataFrame(out | signals).head(rows)
    return {"log": log, "items": catalogue, "users": make_users(users)}


SCHEMA = Schema(
    user="user_id",
    item="item_id",
    time="ts",
    request="req",
    position="rank",
    propensity="p",
    candidates="candidates",
    duration="duration_ms",
    signals=[
        Signal("like", column="liked"),
        Signal("taps", kind="count"),
        Signal("report", column="reported", sign=-1),
        Signal("watch_time", column="watch_ms", kind="duration", unit="ms"),
    ],
    main="watch_time",
    author="shop",
    tag="kind",
    history=8,
)
