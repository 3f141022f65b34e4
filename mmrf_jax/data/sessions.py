"""Session logs in memory: selecting and joining sessions, and cutting them into training segments.

All functions use NumPy without a Python loop over sessions. `mmrf_jax.data.records` writes and reads the logs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmrf_jax import types
from mmrf_jax.data.session_log import Sessions

_PER_REQUEST = ("context", "candidates", "slate", "feedback", "log_propensity", "scores")
_PER_SESSION = tuple(f.name for f in dataclasses.fields(Sessions) if f.name not in (*_PER_REQUEST, "offsets"))


def num_exposures(log: Sessions) -> int:
    """Return the number of videos shown in the whole log."""
    return int((log.slate >= 0).sum())


def ragged_arange(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return `concatenate([arange(s, s + n) for s, n in zip(starts, lengths)])`, [sum(lengths)] int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(np.asarray(starts, np.int64) - ends + lengths, lengths)


def select_sessions(log: Sessions, which: np.ndarray) -> Sessions:
    """Select sessions and their requests by a boolean mask [n], or by indices [m] in their order.

    The result has views of the log's arrays if the sessions are consecutive.
    """
    which = np.asarray(which)
    if which.dtype == bool:
        if which.shape != (log.num_sessions,):
            raise ValueError(
                f"mask has shape {which.shape}, the log has {log.num_sessions} sessions; give one bit each"
            )
        which = np.flatnonzero(which)
    which = which.astype(np.int64)
    starts = log.offsets[:-1][which]
    lengths = log.offsets[1:][which] - starts
    sessions: slice | np.ndarray
    requests: slice | np.ndarray
    contiguous = len(which) > 0 and bool((np.diff(which) == 1).all())
    if contiguous:
        first, last = int(which[0]), int(which[-1]) + 1
        sessions, requests = slice(first, last), slice(int(log.offsets[first]), int(log.offsets[last]))
    else:
        sessions, requests = which, ragged_arange(starts, lengths)
    fields: dict[str, Any] = {name: getattr(log, name)[sessions] for name in _PER_SESSION}
    fields |= {name: None if getattr(log, name) is None else getattr(log, name)[requests] for name in _PER_REQUEST}
    return Sessions(offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), **fields)


def concatenate(logs: Sequence[Sessions]) -> Sessions:
    """Join logs one after another.

    Raises:
      ValueError: for no log, or if some logs hold scores and others do not.
    """
    if not logs:
        raise ValueError("no log to concatenate; give at least one")
    scored = [log.scores is not None for log in logs]
    if any(scored) != all(scored):
        raise ValueError(f"{sum(scored)} of {len(logs)} logs hold scores; set scores=None in all or in none")
    ends = np.cumsum([0, *(log.num_requests for log in logs)])
    fields: dict[str, Any] = {name: np.concatenate([getattr(log, name) for log in logs]) for name in _PER_SESSION}
    for name in _PER_REQUEST:
        fields[name] = None if name == "scores" and not scored[0] else np.concatenate([getattr(x, name) for x in logs])
    starts = [log.offsets[:-1] + end for log, end in zip(logs, ends[:-1], strict=True)]
    return Sessions(offsets=np.concatenate([*starts, ends[-1:]]).astype(np.int64), **fields)


def exposure_index(log: Sessions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (session, request, slot) [n] of every exposure of a log, in order."""
    request, slot = np.nonzero(log.slate >= 0)
    session = np.repeat(np.arange(log.num_sessions), np.diff(log.offsets))
    return session[request], request, slot


def mean_return(log: Sessions, discount: float) -> np.ndarray:
    """Return the mean [S] over all requests of the return to the end of the session, discounted per request."""
    reward = np.where((log.slate >= 0)[..., None], log.feedback, 0.0).sum(axis=1, dtype=np.float64)  # [r, S]
    length = np.diff(log.offsets)
    total, after = np.zeros(reward.shape[1]), np.zeros((log.num_sessions, reward.shape[1]))
    for t in range(int(length.max(initial=0)) - 1, -1, -1):
        live = np.flatnonzero(t < length)
        after[live] = reward[log.offsets[live] + t] + discount * after[live]
        total += after[live].sum(axis=0)
    return total / max(log.num_requests, 1)


def freeze_histories(log: Sessions) -> Sessions:
    """Make every request a session that starts from the history of the user's first session in the log.

    The sessions of a user must be in time order. The context of a request is unchanged.

    The scores of a user's requests then cannot depend on the feedback in the log itself. Within-user metrics need that:
    among a few exposures with both labels, each observed positive makes the next less likely (with two it decides it).
    A score that follows the feedback would therefore gain or lose by arithmetic alone.
    """
    session = np.repeat(np.arange(log.num_sessions), np.diff(log.offsets))
    _, first, user = np.unique(log.user_id, return_index=True, return_inverse=True)
    start = first[user][session]
    never = np.zeros(len(session), bool)
    fields: dict[str, Any] = {name: getattr(log, name)[session] for name in ("user_id", "date", "profile")}
    fields |= {name: getattr(log, name)[start] for name in ("history_videos", "history_feedback", "history_mask")}
    fields |= {name: getattr(log, name) for name in _PER_REQUEST}
    return Sessions(**fields, terminated=never, truncated=~never, offsets=np.arange(len(session) + 1, dtype=np.int64))


def segment_index(log: Sessions, num_requests: int) -> np.ndarray:
    """Return where each training segment starts: rows to shuffle, shard and pass to `gather_segments`.

    A session of R requests has ceil(R / T) segments. Segment i trains on requests iT … min((i + 1)T, R) − 1 and
    bootstraps from request (i + 1)T, if there is one, which is the first request of segment i + 1.

    Args:
      log: the sessions.
      num_requests: T, the requests of a segment that are trained on.

    Returns:
      [M, 2] int64: session, and first request (a row of the request arrays).

    Raises:
      ValueError: for T < 1.
    """
    if num_requests < 1:
        raise ValueError(f"a segment of {num_requests} requests cannot be trained on; use at least 1")
    lengths = np.diff(log.offsets)
    count = -(-lengths // num_requests)
    session = np.repeat(np.arange(log.num_sessions), count)
    step = ragged_arange(np.zeros(len(count), np.int64), count)
    return np.stack([session, log.offsets[session] + step * num_requests], axis=1).astype(np.int64)


def gather_segments(log: Sessions, index_rows: np.ndarray, num_requests: int) -> types.SessionBatch:
    """Gather the segments of rows of `segment_index`, padded to T + 1 requests.

    Every request of the log must expose at least one video (`write_log` checks it). A slate position of −1 becomes 0
    with `slate_mask` False. Requests beyond the session are zeros (log-propensity NaN) with `mask` False. `terminated`
    and `truncated` are set at the session's last request only. The history is the last H exposures before the segment:
    those from before the session, then those of the session.

    Args:
      log: the sessions.
      index_rows: [B, 2] int64 rows of `segment_index(log, num_requests)`.
      num_requests: T, as passed to `segment_index`.

    Returns:
      A batch of NumPy arrays, [B, T + 1, ...].
    """
    session, start = index_rows[:, 0], index_rows[:, 1]
    first, end = log.offsets[session], log.offsets[session + 1]
    rows = start[:, None] + np.arange(num_requests + 1)
    mask = rows < end[:, None]
    last = rows == end[:, None] - 1
    rows = np.minimum(rows, end[:, None] - 1)

    def at_requests(values: np.ndarray) -> np.ndarray:
        values = values[rows]
        values[~mask] = 0
        return values

    slate = log.slate[rows]
    slate_mask = (slate >= 0) & mask[..., None]
    feedback = at_requests(log.feedback)
    feedback[~slate_mask] = 0
    return types.SessionBatch(
        user_id=log.user_id[session],
        date=log.date[session],
        profile=log.profile[session],
        history=_history(log, session, first, start),
        context=at_requests(log.context),
        candidates=at_requests(log.candidates),
        slate=np.where(slate_mask, slate, 0),
        slate_mask=slate_mask,
        feedback=feedback,
        log_propensity=np.where(mask, log.log_propensity[rows], np.float32(np.nan)),
        mask=mask,
        terminated=last & log.terminated[session][:, None],
        truncated=last & log.truncated[session][:, None],
    )


def padded_batches(
    log: Sessions, index: np.ndarray, size: int, num_requests: int
) -> Iterator[tuple[slice, types.SessionBatch, np.ndarray]]:
    """Yield segments in batches of `size`, the last one padded by repetition.

    Args:
      log: the sessions.
      index: [n, 2] rows of `segment_index(log, num_requests)`.
      size: B.
      num_requests: T.

    Yields:
      The rows of `index`, their batch, and [B, T] bool where a request is one of theirs.
    """
    for start in range(0, len(index), size):
        rows = slice(start, min(start + size, len(index)))
        batch = gather_segments(log, np.resize(index[rows], (size, 2)), num_requests)
        yield rows, batch, batch.mask[:, :-1] & (np.arange(size) < rows.stop - start)[:, None]


def _history(log: Sessions, session: np.ndarray, first: np.ndarray, start: np.ndarray) -> types.Exposure:
    """Return the [B, H] exposures before request `start` of a session whose first request is `first`."""
    h = log.history_videos.shape[1]
    k = log.slate.shape[1]
    videos = log.history_videos[session]
    feedback = log.history_feedback[session]
    mask = log.history_mask[session].astype(bool)
    window = int(min(h, (start - first).max(initial=0)))  # H requests have at least H exposures
    if window:
        rows = start[:, None] + np.arange(-window, 0)
        slate = np.where((rows >= first[:, None])[..., None], log.slate[rows], -1)
        shown = (slate >= 0).reshape(len(rows), window * k)
        newer = np.cumsum(shown[:, ::-1], axis=1)[:, ::-1]  # number of exposures from this one on
        taken = np.minimum(newer[:, 0], h)
        # The history from before the session moves left by the number of the session's exposures.
        source = np.arange(h) + taken[:, None]
        arrived = source < h
        source = np.minimum(source, h - 1)
        videos = np.take_along_axis(videos, source, 1)
        feedback = np.take_along_axis(feedback, source[..., None], 1)
        mask = np.take_along_axis(mask, source, 1) & arrived
        b, flat = np.nonzero(shown & (newer <= h))
        slot = h - newer[b, flat]
        row, position = rows[b, flat // k], flat % k
        videos[b, slot] = log.candidates[row, log.slate[row, position]]
        feedback[b, slot] = log.feedback[row, position]
        mask[b, slot] = True
    videos[~mask] = 0
    feedback[~mask] = 0
    return types.Exposure(videos=videos, feedback=feedback, mask=mask)
