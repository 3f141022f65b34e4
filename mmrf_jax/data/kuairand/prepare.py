"""From official files to blocks of sessions: the config, and reading, cleaning, fitting and gathering in one place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from absl import logging

from mmrf_jax import types
from mmrf_jax.data import records
from mmrf_jax.data.kuairand import candidates, clean, columns, features, requests
from mmrf_jax.data.schema import Schema, SessionLog
from mmrf_jax.data.splits import SPLITS, SplitDates

SESSION_GAP_MINUTES = {"pure": 24 * 60, "1k": 30, "27k": 30}
RANDOM_SPLIT = "random_test"


@dataclasses.dataclass(frozen=True)
class KuaiRandConfig:
    """How logs become sessions.

    Attributes:
      train_until, valid_until, test_from: days of the splits, such as 20220502.
      candidates: C of a request. slate: K, the most videos of a request. history: H.
      session_gap_minutes: absence that ends a session; None is a day for Pure, which keeps few videos of each feed, and
        half an hour for 1K and 27K.
      request_gap_minutes: the most minutes between two videos of a request.
      seed: of the candidates.

    Raises:
      ValueError: for sizes that cannot be.
    """

    train_until: int = 20220502
    valid_until: int = 20220503
    test_from: int = 20220504
    candidates: int = 100
    slate: int = 6
    history: int = 32
    session_gap_minutes: float | None = None
    request_gap_minutes: float = 30.0
    seed: int = 0

    def __post_init__(self):
        self.dates  # noqa: B018 validates
        for name in ("slate", "history"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; set it to 1 or more")
        if self.candidates < self.slate:
            raise ValueError(f"candidates={self.candidates} is less than slate={self.slate}; raise candidates")
        for name in ("session_gap_minutes", "request_gap_minutes"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value} is not positive; set it to the minutes of an absence")

    @property
    def dates(self) -> SplitDates:
        return SplitDates(self.train_until, self.valid_until, self.test_from)

    def fingerprint(self) -> str:
        """16 hex digits that differ where any field differs."""
        return digest(dataclasses.asdict(self))


@dataclasses.dataclass
class Prepared:
    """All that is known once the files are read, except the candidates and histories, which are made block by block."""

    config: KuaiRandConfig
    catalogue: features.Catalogue
    profiles: features.Profiles
    plans: dict[str, requests.Plan]
    pools: dict[str, candidates.Pool]
    report: dict

    @classmethod
    def build(cls, source: columns.Source, config: KuaiRandConfig) -> Prepared:
        videos = columns.read_videos(source.videos)
        frame, report = clean.clean_log(source, videos)
        catalogue = features.build_catalogue(frame, videos, config.train_until)
        is_random = pl.col("is_rand") == 1
        standard, random = frame.filter(~is_random), frame.filter(is_random & (pl.col("date") >= config.test_from))
        del frame
        train_users = standard.filter(pl.col("date") <= config.train_until)["user_id"].unique().to_numpy()
        profiles = features.build_profiles(columns.read_users(source.users), train_users)

        rows = requests.Rows.from_frame(standard, catalogue.rows_of(standard["video_id"].to_numpy()))
        session_gap = config.session_gap_minutes or SESSION_GAP_MINUTES[source.variant]
        split = config.dates.split_of(rows.date)
        plans = {}
        for i, (name, last) in enumerate(zip(SPLITS, (config.train_until, config.valid_until, None), strict=True)):
            past = np.ones(len(rows), bool) if last is None else rows.date <= last
            plans[name] = requests.plan_standard(
                rows.take(past), split[past] == i, config.slate, session_gap, config.request_gap_minutes
            )
        random_rows = requests.Rows.from_frame(random, catalogue.rows_of(random["video_id"].to_numpy()))
        plans[RANDOM_SPLIT] = requests.plan_random(random_rows, rows)

        # Pure is the pool of the random log, whole; in the larger releases that pool is known by its exposures only
        pool = candidates.Pool(catalogue.live_from, features.NEVER)
        random_from = np.maximum(catalogue.live_from, catalogue.random_from)
        random_pool = pool if source.variant == "pure" else candidates.Pool(random_from, features.NEVER)
        pools = {name: random_pool if name == RANDOM_SPLIT else pool for name in plans}
        report = {
            "variant": source.variant,
            "files": [path.name for path in source.files],
            "log": report,
            "session_gap_minutes": session_gap,
            "standard_rows_between_splits": int((split < 0).sum()),
            "users_without_features": int((profiles.rows_of(np.unique(rows.user)) == 0).sum()),
            "videos": catalogue.items.num_videos - 1,
            "videos_without_features": catalogue.items.num_videos - 1 - int(videos["video_id"].drop_nulls().len()),
            "videos_never_candidates": int((catalogue.live_from[1:] == features.NEVER).sum()),
            "splits": {name: _counts(plan) for name, plan in plans.items()},
        }
        for name, plan in plans.items():
            pools[name].check(plan.rows.date[plan.request_first[:-1]], config.candidates)
            logging.info("KuaiRand %s: %s", name, ", ".join(f"{v} {k}" for k, v in report["splits"][name].items()))
        return cls(config, catalogue, profiles, plans, pools, report)

    @property
    def schema(self) -> Schema:
        items = self.catalogue.items
        return Schema(
            num_videos=items.num_videos,
            num_authors=items.num_authors,
            num_tags=items.num_tags,
            num_users=int(self.profiles.user_id.max()) + 1,
            item_features=items.features.shape[1],
            profile=self.profiles.values.shape[1],
            context=requests.CONTEXT,
            candidates=self.config.candidates,
            slate=self.config.slate,
            history=self.config.history,
        )

    def save(self, path: pathlib.Path) -> None:
        """Writes the items, what was fitted, and the days on which videos are live, as one npz file."""
        items = {f.name: getattr(self.catalogue.items, f.name) for f in dataclasses.fields(types.Items)}
        fitted = {f"fitted/{k}": v for k, v in {**self.catalogue.fitted, **self.profiles.fitted}.items()}
        live = {"live_from": self.catalogue.live_from, "video_id": self.catalogue.video_id}
        arrays: dict[str, Any] = {f"items/{k}": v for k, v in items.items()} | fitted | live
        np.savez(path, **arrays)

    def blocks(self, split: str) -> Iterator[SessionLog]:
        """Sessions of a split, `records.SESSIONS_PER_RECORD` at a time; one empty block where there are none."""
        step, total = records.SESSIONS_PER_RECORD, self.plans[split].num_sessions
        for start in range(0, max(total, 1), step):
            yield self.gather(split, np.arange(start, min(start + step, total)))

    def gather(self, split: str, sessions: np.ndarray) -> SessionLog:
        """The log of consecutive sessions."""
        plan, k = self.plans[split], self.config.slate
        first = int(plan.session_first[sessions[0]]) if len(sessions) else 0
        end = int(plan.session_first[sessions[-1] + 1]) if len(sessions) else 0
        offsets = np.append(plan.session_first[sessions], end) - first
        request = np.arange(first, end)
        row, after = plan.request_first[request], plan.request_first[request + 1]
        exposure = row[:, None] + np.arange(k)
        shown = exposure < after[:, None]
        exposure = np.where(shown, exposure, row[:, None])
        exposed = np.where(shown, plan.rows.item[exposure], -1)
        feedback = plan.rows.feedback(exposure)
        feedback[~shown] = 0
        day = plan.rows.date[row]
        key = candidates.request_keys(
            self.config.seed, plan.rows.user[row], plan.rows.time[row], self.catalogue.video_id[plan.rows.item[row]]
        )
        drawn, slate = self.pools[split].sample(key, day, exposed, self.config.candidates)
        videos, history_feedback, mask = plan.history(sessions, self.config.history)
        start = plan.request_first[plan.session_first[sessions]]
        terminated = plan.terminated[sessions]
        known = -np.log(self.config.candidates) if split == RANDOM_SPLIT else np.nan
        return SessionLog(
            user_id=plan.rows.user[start],
            date=plan.rows.date[start],
            profile=self.profiles.of(plan.rows.user[start]),
            history_videos=videos,
            history_feedback=history_feedback,
            history_mask=mask,
            terminated=terminated,
            truncated=~terminated,
            offsets=offsets.astype(np.int64),
            context=plan.context(request, request - np.repeat(plan.session_first[sessions], np.diff(offsets))),
            candidates=drawn,
            slate=slate,
            feedback=feedback,
            log_propensity=np.full(len(request), known, np.float32),
            scores=None,
        )


def _counts(plan: requests.Plan) -> dict[str, int]:
    return {
        "users": len(np.unique(plan.rows.user)),
        "sessions": plan.num_sessions,
        "requests": len(plan.request_first) - 1,
        "exposures": len(plan.rows),
        "terminated": int(plan.terminated.sum()),
    }


def digest(value: Any) -> str:
    """16 hex digits of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
