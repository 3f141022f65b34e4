"""A session log on the devices, split over them by rows: batches of segments are gathered there, not on the host.

Rows are joined bit by bit, so a batch is exactly that of `data.sessions.gather_segments`. The host keeps where sessions
begin and how they end: a few numbers for each.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax import types
from mmrf_jax.data import sessions
from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.parallel import multihost
from mmrf_jax.parallel.partitioner import Partitioner

INDEX = 5  # columns of `segment_index`: session, row of the first request, begin and end of the session, how it ended


class Layout(NamedTuple):
    """Sizes of a log's rows; letters as in `mmrf_jax.types`."""

    profile: int  # Du
    history: int  # H
    context: int  # Dx
    candidates: int  # C
    slate: int  # K
    signals: int  # S

    @classmethod
    def of(cls, spec: InputSpec) -> Layout:
        """Return the sizes of logs with a spec."""
        return cls(spec.profile, spec.history, spec.context, spec.candidates, spec.slate, len(spec.signals))

    @property
    def bytes_per_session(self) -> int:
        """Bytes of a session, without its requests."""
        return 4 * (2 + self.profile + self.history * (1 + self.signals))

    @property
    def bytes_per_request(self) -> int:
        """Bytes of a request."""
        return 4 * (self.context + self.candidates + self.slate + 1 + self.slate * (1 + self.signals))


class Rows(NamedTuple):
    """The rows of a log on the devices, uint32, split over them; rows without a session or request are zeros."""

    sessions: jax.Array  # [n', ·] user id, date, profile, and the history at arrival: videos (-1: none), feedback
    requests: jax.Array  # [r', ·] context, candidates, slate, log-propensity
    exposures: jax.Array  # [r', K (1 + S)] shown videos (-1: none) and their feedback


@dataclasses.dataclass(frozen=True)
class DeviceLog:
    """A log on the devices, and what the host knows of its n sessions.

    Attributes:
      feedback_statistics: mean and standard deviation [S] of exposure feedback, and the mean return [S], as
        `batches.feedback_statistics`.
    """

    layout: Layout
    rows: Rows
    first: np.ndarray  # [n] int64, row of the session's first request
    length: np.ndarray  # [n] int64, its requests
    terminated: np.ndarray  # [n] bool
    truncated: np.ndarray  # [n] bool
    feedback_statistics: tuple[np.ndarray, np.ndarray, np.ndarray]

    @property
    def num_sessions(self) -> int:
        return len(self.first)

    @property
    def num_requests(self) -> int:
        return int(self.length.sum())

    def segment_index(self, num_requests: int) -> np.ndarray:
        """Return the segments [M, INDEX] int32 in the order of `sessions.segment_index`."""
        count = -(-self.length // num_requests)
        session = np.repeat(np.arange(self.num_sessions), count)
        first = self.first[session]
        start = first + sessions.ragged_arange(np.zeros(len(count), np.int64), count) * num_requests
        ended = self.terminated[session] + 2 * self.truncated[session]
        return np.stack([session, start, first, first + self.length[session], ended], axis=1).astype(np.int32)

    def head(self, number: int) -> Sessions:
        """Return the first sessions, at most `number`, on the host; all processes must call this."""
        number = min(number, self.num_sessions)
        picked = sessions.ragged_arange(self.first[:number], self.length[:number])
        where = (np.arange(number), picked, picked)
        s, r, e = (np.asarray(_take(rows, at.astype(np.int32))) for rows, at in zip(self.rows, where, strict=True))
        return _unpacked(self.layout, s, r, e, self.length[:number], self.terminated, self.truncated)


def padded_size(number: int) -> int:
    """Round a size up to three significant bits, so that programs fit the logs of later rounds too."""
    step = 2 ** max(math.ceil(math.log2(max(number, 1))) - 3, 0)
    return -(-number // step) * step


def pack(*parts: chex.Array) -> chex.Array:
    """Join float32 and int32 arrays [n, ...] as rows [n, ·] of uint32, bit by bit."""

    def words(x):
        if isinstance(x, np.ndarray):
            return np.ascontiguousarray(x).view(np.uint32).reshape(len(x), -1)
        return jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(x.shape[0], -1)

    xp = np if isinstance(parts[0], np.ndarray) else jnp
    return xp.concatenate([words(x) for x in parts], axis=-1)


def pack_sessions(user_id, date, profile, history: types.Exposure) -> chex.Array:
    """Return rows of `Rows.sessions`."""
    xp = np if isinstance(user_id, np.ndarray) else jnp
    return pack(user_id, date, profile, xp.where(history.mask, history.videos, xp.int32(-1)), history.feedback)


def pack_requests(context, candidates, slate, log_propensity) -> chex.Array:
    """Return rows of `Rows.requests`; the slate has -1 where fewer were shown."""
    return pack(context, candidates, slate, log_propensity)


def pack_exposures(candidates, slate, feedback) -> chex.Array:
    """Return rows of `Rows.exposures`; the slate has -1 where fewer were shown."""
    xp = np if isinstance(slate, np.ndarray) else jnp
    videos = xp.take_along_axis(candidates, xp.maximum(slate, xp.int32(0)), axis=-1)
    return pack(xp.where(slate >= 0, videos, xp.int32(-1)), feedback)


def put(
    log: Sessions,
    spec: InputSpec,
    feedback_statistics: tuple[np.ndarray, np.ndarray, np.ndarray],
    partitioner: Partitioner,
) -> DeviceLog:
    """Copy a log to the devices; every process holds the whole of it and passes its part.

    Args:
      log: the log.
      spec: of the log.
      feedback_statistics: see `DeviceLog`.
      partitioner: the devices.
    """

    def padded(x: np.ndarray) -> jax.Array:
        rows = partitioner.num_devices * padded_size(-(-len(x) // partitioner.num_devices))
        own = partitioner.local_rows(np.arange(rows))
        part = x[own[0] : own[-1] + 1]
        return partitioner.shard_inputs(np.pad(part, ((0, len(own) - len(part)), (0, 0))))

    history = types.Exposure(log.history_videos, log.history_feedback, log.history_mask.astype(bool))
    rows = Rows(
        padded(pack_sessions(log.user_id, log.date, log.profile, history)),
        padded(pack_requests(log.context, log.candidates, log.slate, log.log_propensity)),
        padded(pack_exposures(log.candidates, log.slate, log.feedback)),
    )
    ended = (log.terminated.astype(bool), log.truncated.astype(bool))
    return DeviceLog(Layout.of(spec), rows, log.offsets[:-1], np.diff(log.offsets), *ended, feedback_statistics)


def gather(
    layout: Layout, rows: Rows, index: chex.Array, num_requests: int, partitioner: Partitioner
) -> types.SessionBatch:
    """Gather segments as `sessions.gather_segments` does, under jit; only what is gathered moves between devices.

    Args:
      layout: of the log.
      rows: of the log.
      index: [B, INDEX] int32 rows of `DeviceLog.segment_index`, the same on all devices.
      num_requests: T, as passed to `segment_index`.
      partitioner: of the log; the batch is split over its devices.
    """
    session, start = index[:, 0], index[:, 1]
    at = start[:, None] + jnp.arange(-layout.history, num_requests + 1, dtype=jnp.int32)  # [B, H + T + 1]
    last = rows.requests.shape[0] - 1
    at = jnp.clip(at, 0, last)  # `_segments` masks what is not of the session
    now = partitioner.gather_rows(rows.sessions, session)
    requests = partitioner.gather_rows(rows.requests, at[:, layout.history :])
    exposures = partitioner.gather_rows(rows.exposures, at)
    unpack = functools.partial(_segments, layout, num_requests)
    return partitioner.shard_users(unpack, num_replicated=0)(index, now, requests, exposures)


def _segments(layout: Layout, num_requests: int, index, now, requests, exposures) -> types.SessionBatch:
    """Unpack gathered rows as a batch."""
    h, k, s = layout.history, layout.slate, layout.signals
    _, start, first, end, ended = (index[:, i] for i in range(INDEX))
    row = start[:, None] + jnp.arange(-h, num_requests + 1, dtype=jnp.int32)
    videos, feedback = _split(exposures, [k], [jnp.int32, jnp.float32])
    feedback = feedback.reshape(*videos.shape, s)
    videos = jnp.where(((row >= first[:, None]) & (row < end[:, None]))[..., None], videos, -1)
    row, mask = row[:, h:], row[:, h:] < end[:, None]
    last = row == end[:, None] - 1
    kinds = [jnp.float32, jnp.int32, jnp.int32, jnp.float32]
    context, candidates, slate, log_propensity = _split(
        requests, [layout.context, layout.candidates, layout.slate], kinds
    )
    shown = (slate >= 0) & mask[..., None]
    user_id, date, profile, before, liked = _split(
        now, [1, 1, layout.profile, h], [jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.float32]
    )
    old = types.Exposure(before, liked.reshape(*before.shape, s), before >= 0)
    return types.SessionBatch(
        user_id=user_id[:, 0],
        date=date[:, 0],
        profile=profile,
        history=_history(old, videos[:, :h], feedback[:, :h]),
        context=jnp.where(mask[..., None], context, 0.0),
        candidates=jnp.where(mask[..., None], candidates, 0),
        slate=jnp.where(shown, slate, 0),
        slate_mask=shown,
        feedback=jnp.where(shown[..., None], feedback[:, h:], 0.0),
        log_propensity=jnp.where(mask, log_propensity[..., 0], jnp.nan),
        mask=mask,
        terminated=last & (ended % 2 == 1)[:, None],
        truncated=last & (ended >= 2)[:, None],
    )


def _history(old: types.Exposure, videos: chex.Array, feedback: chex.Array) -> types.Exposure:
    """Return the last H of the exposures at arrival and those of the session, [B, H requests, K] with -1 for none."""
    users, h = old.videos.shape
    videos, feedback = videos.reshape(users, -1), feedback.reshape(users, -1, old.feedback.shape[-1])
    shown = videos >= 0
    newer = jnp.cumsum(shown[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]  # number of exposures from this one on
    # The history at arrival moves left by the number of the session's exposures.
    source = jnp.arange(h, dtype=jnp.int32) + jnp.minimum(newer[:, :1], h)
    mask = jnp.take_along_axis(old.mask, jnp.minimum(source, h - 1), 1) & (source < h)
    moved = jnp.take_along_axis(old.videos, jnp.minimum(source, h - 1), 1)
    liked = jnp.take_along_axis(old.feedback, jnp.minimum(source, h - 1)[..., None], 1)
    slot = jnp.where(shown & (newer <= h), h - newer, h)
    user = jnp.arange(users, dtype=jnp.int32)[:, None]
    mask = mask.at[user, slot].set(True, mode="drop")
    moved = moved.at[user, slot].set(videos, mode="drop")
    liked = liked.at[user, slot].set(feedback, mode="drop")
    return types.Exposure(jnp.where(mask, moved, 0), jnp.where(mask[..., None], liked, 0.0), mask)


def _split(rows: chex.Array, sizes: list[int], kinds: list) -> list[chex.Array]:
    """Undo `pack`: the last part has the rest of the columns."""
    ends = np.cumsum(sizes)
    if isinstance(rows, np.ndarray):
        columns = zip(np.split(rows, ends, axis=-1), kinds, strict=True)
        return [np.ascontiguousarray(x).view(np.dtype(kind)) for x, kind in columns]
    parts = jnp.split(rows, ends, axis=-1)
    return [jax.lax.bitcast_convert_type(x, kind) for x, kind in zip(parts, kinds, strict=True)]


@jax.jit
def _take_rows(rows: jax.Array, at: jax.Array) -> jax.Array:
    return rows[at]


def _take(rows: jax.Array, at: np.ndarray) -> np.ndarray:
    """Return some rows on the host."""
    return multihost.fetch(_take_rows(rows, at))


def _unpacked(layout: Layout, s, r, e, length, terminated, truncated) -> Sessions:
    """Return the log of packed rows, in order."""
    number, h = len(length), layout.history
    user_id, date, profile, before, liked = _split(
        s, [1, 1, layout.profile, h], [np.int32, np.int32, np.float32, np.int32, np.float32]
    )
    context, candidates, slate, log_propensity = _split(
        r, [layout.context, layout.candidates, layout.slate], [np.float32, np.int32, np.int32, np.float32]
    )
    _, feedback = _split(e, [layout.slate], [np.int32, np.float32])
    return Sessions(
        user_id=user_id[:, 0],
        date=date[:, 0],
        profile=profile,
        history_videos=np.maximum(before, 0),
        history_feedback=liked.reshape(number, h, layout.signals),
        history_mask=before >= 0,
        terminated=terminated[:number],
        truncated=truncated[:number],
        offsets=np.concatenate([[0], np.cumsum(length)]).astype(np.int64),
        context=context,
        candidates=candidates,
        slate=slate,
        feedback=feedback.reshape(len(r), layout.slate, layout.signals),
        log_propensity=log_propensity[:, 0],
        scores=None,
    )
