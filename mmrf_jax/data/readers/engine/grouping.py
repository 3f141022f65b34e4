"""The order of rows, and where sessions and requests start."""

from __future__ import annotations

import numpy as np

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
MAX_HOURS = 168.0  # of absence; a longer one, or none, counts as a week


def order_of(*keys: np.ndarray) -> np.ndarray:
    """Return `np.lexsort(keys[::-1])` of integers [n]; ten times as fast if all keys fit into 63 bits.

    It then packs keys and positions into one integer each, since NumPy sorts integers with vector instructions.
    """
    n = len(keys[0])
    low = [int(key.min()) if n else 0 for key in keys]
    width = [(int(key.max()) - least).bit_length() if n else 0 for key, least in zip(keys, low, strict=True)]
    of_place = n.bit_length()
    if sum(width) + of_place > 63:
        return np.lexsort(keys[::-1])
    packed = np.zeros(n, np.int64)
    for key, least, bits in zip(keys, low, width, strict=True):  # in place, since there may be many
        packed <<= bits
        packed += key
        packed -= least
    packed <<= of_place
    packed += np.arange(n, dtype=np.int32) if of_place < 32 else np.arange(n)
    packed.sort()
    packed &= (1 << of_place) - 1
    return packed


def session_starts(
    user: np.ndarray, time: np.ndarray, gap_minutes: float, ended: np.ndarray | None = None
) -> np.ndarray:
    """Return [n] bool, True where a session starts; rows [n] sorted by user and time (ms), which end at `ended`."""
    start = np.ones(len(user), bool)
    away = time[1:] - (time if ended is None else ended)[:-1]
    start[1:] = (user[1:] != user[:-1]) | (away > gap_minutes * MINUTE_MS)
    return start


def request_starts(
    session_start: np.ndarray, item: np.ndarray, tab: np.ndarray, time: np.ndarray, size: int, gap_minutes: float
) -> np.ndarray:
    """Return [n] bool, True where a request of at most `size` different videos starts; every session start is one."""
    n = len(item)
    run_start = session_start.copy()
    run_start[1:] |= (tab[1:] != tab[:-1]) | (np.diff(time) > gap_minutes * MINUTE_MS)
    run = np.cumsum(run_start, dtype=np.int32)
    nearest = np.full(n, size)  # rows back to the previous exposure of the video, if near
    for step in range(size - 1, 0, -1):
        nearest[step:][item[step:] == item[: n - step]] = step
    # Where a request that starts at row i would end.
    following = np.minimum(np.arange(n) + size, n)
    for step in range(min(size, n) - 1, 0, -1):
        stops = (run[step:] != run[: n - step]) | (nearest[step:] <= step)
        following[: n - step][stops] = np.flatnonzero(stops) + step
    start = run_start.copy()
    at = np.flatnonzero(run_start)
    while len(at):  # all runs at once, one request per iteration
        at = following[at]
        at = at[at < n]
        at = at[~run_start[at]]
        start[at] = True
    return start
