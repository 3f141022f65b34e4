"""Conversion of some users' usable rows to blocks of sessions, with candidates and histories."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import polars as pl

from mmrf_jax.data import records
from mmrf_jax.data.readers.kuairand import candidates, clean, requests
from mmrf_jax.data.readers.kuairand.catalogue import Catalogue
from mmrf_jax.data.readers.kuairand.job import RANDOM_SPLITS, Job
from mmrf_jax.data.readers.kuairand.profiles import Profiles
from mmrf_jax.data.session_log import SessionLog
from mmrf_jax.data.splits import SPLITS, SplitDates


def random_rows(rows: pl.DataFrame, dates: SplitDates, split: str) -> pl.DataFrame:
    """Return the rows of the random log on the days of one of `RANDOM_SPLITS`."""
    random = rows.filter(pl.col("is_rand") == 1)
    return random.filter(dates.split_of(random["date"].to_numpy()) == SPLITS.index(RANDOM_SPLITS[split]))


@dataclasses.dataclass
class Bucket:
    """The usable rows of some users, and all data needed for their sessions.

    Attributes:
      job: the job.
      rows: usable rows, as returned by `clean.clean`.
      catalogue: all items.
      profiles: all user profiles.
      pools: candidate pool of each split.
      log_end: time (ms) of the last row of each split of the standard log, over all users.
      user_ids: [U] int64 of all users, whose positions are their numbers; None if ids are the numbers.
    """

    job: Job
    rows: pl.DataFrame
    catalogue: Catalogue
    profiles: Profiles
    pools: dict[str, candidates.Pool]
    log_end: dict[str, int]
    user_ids: np.ndarray | None = None

    @functools.cached_property
    def _standard(self) -> requests.Rows:
        return self._read(self.rows.filter(pl.col("is_rand") == 0))

    def _read(self, frame: pl.DataFrame) -> requests.Rows:
        return requests.Rows.from_frame(frame, self.catalogue.rows_of(frame["video_id"].to_numpy()))

    def plan(self, split: str) -> requests.Plan:
        """Plan the sessions of a split."""
        config = self.job.config
        if split in RANDOM_SPLITS:
            return requests.plan_random(self._read(random_rows(self.rows, config.dates, split)), self._standard)
        last = {"train": config.train_until, "valid": config.valid_until}.get(split, clean.NEVER)
        past = self._standard.take(self._standard.date <= last)
        own = config.dates.split_of(past.date) == SPLITS.index(split)
        return requests.plan_standard(
            past, own, config.slate, self.job.session_gap_minutes, config.request_gap_minutes, self.log_end[split]
        )

    def blocks(self, split: str, plan: requests.Plan) -> Iterator[SessionLog]:
        """Yield the sessions of a split, `records.SESSIONS_PER_RECORD` at a time; one empty block if there are none."""
        step, total = records.SESSIONS_PER_RECORD, plan.num_sessions
        for start in range(0, max(total, 1), step):
            yield self.gather(split, plan, np.arange(start, min(start + step, total)))

    def gather(self, split: str, plan: requests.Plan, sessions: np.ndarray) -> SessionLog:
        """Build the log of consecutive sessions."""
        config = self.job.config
        first = int(plan.session_first[sessions[0]]) if len(sessions) else 0
        end = int(plan.session_first[sessions[-1] + 1]) if len(sessions) else 0
        offsets = np.append(plan.session_first[sessions], end) - first
        request = np.arange(first, end)
        row, after = plan.request_first[request], plan.request_first[request + 1]
        exposure = row[:, None] + np.arange(config.slate)
        shown = exposure < after[:, None]
        exposure = np.where(shown, exposure, row[:, None])
        exposed = np.where(shown, plan.rows.item[exposure], -1)
        feedback = plan.rows.feedback(exposure)
        feedback[~shown] = 0
        day = plan.rows.date[row]
        key = candidates.request_keys(
            config.seed, plan.rows.user[row], plan.rows.time[row], self.catalogue.video_id[plan.rows.item[row]]
        )
        drawn, slate = self.pools[split].sample(key, day, exposed, config.candidates)
        videos, history_feedback, mask = plan.history(sessions, config.history)
        start = plan.request_first[plan.session_first[sessions]]
        user = plan.rows.user[start]
        number = user if self.user_ids is None else np.searchsorted(self.user_ids, user).astype(np.int32)
        terminated = plan.terminated[sessions]
        known = -np.log(config.candidates) if split in RANDOM_SPLITS else np.nan
        return SessionLog(
            user_id=number,
            date=plan.rows.date[start],
            profile=self.profiles.of(user),
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


def counts(plan: requests.Plan) -> dict[str, int]:
    """Count users, sessions, requests, exposures and terminated sessions of a plan."""
    return {
        "users": int((np.diff(plan.rows.user) != 0).sum()) + (len(plan.rows) > 0),
        "sessions": plan.num_sessions,
        "requests": len(plan.request_first) - 1,
        "exposures": len(plan.rows),
        "terminated": int(plan.terminated.sum()),
    }
