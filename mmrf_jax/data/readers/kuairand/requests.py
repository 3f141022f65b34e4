"""Conversion of log rows to sessions of requests, with candidates and each user's history before the session.

KuaiRand has neither session nor request ids. A session ends when the user is away for longer than the session gap. A
request is a **reconstruction**: consecutive exposures of a session, of the same tab, at most `request_gap_minutes`
apart, up to K of them and all different. The actual ranking requests are unknown.

KuaiRand does not log the candidates of a request either. They are its exposed videos plus others sampled uniformly from
the pool of videos live on that day. Sampling hashes (seed, request), so it depends neither on the order nor on the
presence of other requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import polars as pl

from mmrf_jax.data.readers.engine import build
from mmrf_jax.data.readers.engine.candidates import CandidatePool, request_keys
from mmrf_jax.data.readers.engine.grouping import HOUR_MS
from mmrf_jax.data.readers.kuairand import csv_files
from mmrf_jax.data.readers.kuairand.clean import UTC_OFFSET_MS
from mmrf_jax.data.readers.kuairand.features import Catalogue

NUM_TABS = 15
CONTEXT = 2 + NUM_TABS + 1 + 2


@dataclasses.dataclass
class KuaiRandLookup:
    """What the sessions of some users need of the whole log (`build.Lookup`).

    Attributes:
      rows: usable rows [n] of the users.
      num_candidates: C.
      pools: {part: items by the day from which they are candidates}.
      profiles: [U + 1, Du] of all users.
      profile_row: [n] row of each row's user among them.
    """

    rows: build.ShownRows
    num_candidates: int
    pools: Mapping[str, CandidatePool]
    profiles: np.ndarray
    profile_row: np.ndarray

    def candidates(self, requests: build.Requests) -> tuple[np.ndarray, np.ndarray]:
        """Return sampled candidates."""
        return build.sample_candidates(self.rows, self.pools[requests.plan.part], requests, self.num_candidates)

    def propensities(self, requests: build.Requests, slate: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return those of random slates."""
        return build.unlogged_propensities(requests, self.num_candidates)

    def profile(self, row: np.ndarray) -> np.ndarray:
        """Return the profiles of users."""
        return self.profiles[self.profile_row[row]]

    def context(self, row: np.ndarray, away: np.ndarray) -> np.ndarray:
        """Return sine and cosine of the hour (UTC+8), one-hot tab 0 … 14 and other, and the absence."""
        angle = (self.rows.time[row] + UTC_OFFSET_MS) % (24 * HOUR_MS) / HOUR_MS * (2 * np.pi / 24)
        tab = self.rows.run[row]
        tab = np.where((tab >= 0) & (tab < NUM_TABS), tab, NUM_TABS)
        hour = np.stack([np.sin(angle), np.cos(angle)], axis=1)
        return np.concatenate([hour, tab[:, None] == np.arange(NUM_TABS + 1), away], axis=1)


def arrange_rows(frame: pl.DataFrame, catalogue: Catalogue, seed: int, user_ids: np.ndarray | None) -> build.ShownRows:
    """Return usable rows as arrays.

    Args:
      frame: as returned by `clean.clean_rows`.
      catalogue: all items.
      seed: of the candidates.
      user_ids: [U] int64 of all users, whose positions are their numbers; None if ids are the numbers.
    """
    user, time, video = (frame[name].to_numpy() for name in ("user_id", "time_ms", "video_id"))
    feedback = np.empty((len(frame), len(csv_files.SIGNAL_COLUMNS) + 1), np.float32)
    feedback[:, :-1] = frame.select(csv_files.SIGNAL_COLUMNS).to_numpy()
    feedback[:, -1] = frame["play_time_ms"].to_numpy() / 1000
    return build.ShownRows(
        user=user if user_ids is None else np.searchsorted(user_ids, user).astype(np.int32),
        item=catalogue.rows_of(video),
        time=time,
        day=frame["date"].to_numpy(),
        feedback=feedback,
        key=request_keys(seed, user, time, video),
        ended=time,
        run=frame["tab"].to_numpy(),
        random=frame["is_rand"].to_numpy() == 1,
        strict=True,
    )
