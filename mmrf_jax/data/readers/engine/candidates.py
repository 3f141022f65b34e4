"""Candidates of requests, sampled from the items that are live on a day; a request's depend on no other request."""

from __future__ import annotations

import pathlib

import numpy as np

from mmrf_jax.data.readers.engine.grouping import order_of

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_AT_ONCE = 256  # requests whose random draws fit in a core's cache


def mix(x: np.ndarray) -> np.ndarray:
    """Apply the SplitMix64 finaliser: uint64 to uint64, every output bit depends on every input bit."""
    y = x >> np.uint64(30)
    y ^= x
    y *= np.uint64(0xBF58476D1CE4E5B9)
    y ^= y >> np.uint64(27)
    y *= np.uint64(0x94D049BB133111EB)
    y ^= y >> np.uint64(31)
    return y


def request_keys(seed: int, *parts: np.ndarray) -> np.ndarray:
    """Return keys [R] uint64 of requests, from the seed and integers [R] that identify a request."""
    key: np.ndarray = np.full(len(parts[0]), seed, np.uint64)
    for part in parts:
        key = mix(key + _GOLDEN) ^ part.astype(np.uint64)
    return mix(key + _GOLDEN)


def _draw(key: np.ndarray, count: int, size: np.ndarray) -> np.ndarray:
    """Return the first numbers [R, count] of the streams of keys [R], uniform in [0, size); `size` is uint64."""
    bits = mix(key[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    bits >>= np.uint64(32)
    bits *= size
    bits >>= np.uint64(32)
    return bits.view(np.int64)


class CandidatePool:
    """The videos that are live on each day: those whose first day is not after that day."""

    def __init__(self, videos: np.ndarray, days: np.ndarray):
        """Store the pool; see `make_pool`.

        Args:
          videos: [P] int32 item rows, in the order of their first days.
          days: [P] int32 first days.
        """
        self._order, self._days = videos, days

    @property
    def size(self) -> int:
        return len(self._order)

    def save(self, path: pathlib.Path) -> None:
        """Write the pool to files whose names begin with `path`; see `read_pool`."""
        np.save(f"{path}-videos.npy", self._order)
        np.save(f"{path}-days.npy", self._days)

    def live(self, dates: np.ndarray) -> np.ndarray:
        """Return the number [R] int64 of videos live on dates [R]."""
        return np.searchsorted(self._days, dates, side="right")

    def check(self, date: int, candidates: int, slate: int) -> None:
        """Raise ValueError if fewer than `candidates` videos are live on a date; later dates have at least as many."""
        live = int(self.live(np.array(date)))
        if live == 0:
            raise ValueError(
                f"no video is live on {date}, the first day of a split: none was uploaded or shown before; add video "
                "features or earlier days of the log"
            )
        if live < candidates:
            fields = "candidates" if live >= slate else "slate and candidates"
            raise ValueError(
                f"{live} videos are live on {date}, {candidates} candidates are asked for; "
                f"set {fields} to at most {live}"
            )

    def sample(
        self, key: np.ndarray, dates: np.ndarray, exposed: np.ndarray, candidates: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sample the candidates of R requests.

        Args:
          key: [R] uint64, `request_keys`.
          dates: [R] the day of each request; `check` must accept them.
          exposed: [R, K] int32 item rows, different within a request; −1 at its end where fewer were shown.
          candidates: C.

        Returns:
          Candidates [R, C] int32, all different, the exposed ones at random positions; and slate [R, K] int32, the
          positions of the exposed ones in the given order, −1 where there is none.
        """
        found = np.empty((len(key), candidates), np.int32)
        size = self.live(dates).astype(np.uint64)
        for start in range(0, len(key), _AT_ONCE):
            at = slice(start, start + _AT_ONCE)
            self._different(key[at], size[at], exposed[at], found[at])
        return found, _place(key, found, exposed)

    def _different(self, key: np.ndarray, size: np.ndarray, exposed: np.ndarray, found: np.ndarray) -> None:
        """Fill `found` [R, C] with the exposed videos, then with the first draws of each key, without duplicates."""
        (_, k), c = exposed.shape, found.shape[1]
        shown = (exposed >= 0).sum(1).astype(np.uint64)
        shifted = key - shown * _GOLDEN  # so that the first draw comes after the exposed
        np.take(self._order, _draw(shifted, c, size[:, None]), out=found, mode="clip")
        found[:, :k] = np.where(exposed >= 0, exposed, found[:, :k])
        ranked = np.sort(found, axis=1)
        todo, count = np.flatnonzero((ranked[:, 1:] == ranked[:, :-1]).any(1)), c + c // 4 + 16
        absent = -1 - np.arange(k)  # different from each other, so that none counts as a duplicate
        while len(todo):  # rows with a duplicate need more draws
            others = self._order[_draw(key[todo], count, size[todo, None])]
            drawn = np.concatenate([np.where(exposed[todo] >= 0, exposed[todo], absent), others], axis=1)
            order = np.argsort(drawn, axis=1, kind="stable")
            ranked = np.take_along_axis(drawn, order, 1)
            repeated = np.zeros(drawn.shape, bool)
            np.put_along_axis(repeated, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], 1)
            fresh = ~repeated & (drawn >= 0)
            rank = np.cumsum(fresh, axis=1)
            enough = rank[:, -1] >= c
            fresh &= (rank <= c) & enough[:, None]
            found[todo[enough]] = drawn[fresh].reshape(-1, c)
            todo, count = todo[~enough], count * 2


def make_pool(live_from: np.ndarray, never: int) -> CandidatePool:
    """Return the pool of item rows [V] by the day from which each is live, int32; rows with `never` are left out."""
    order = order_of(live_from)
    days = live_from[order]
    size = int(np.searchsorted(days, never))
    return CandidatePool(order[:size].astype(np.int32), days[:size])


def read_pool(path: pathlib.Path) -> CandidatePool:
    """Read a pool written by `Pool.save`, as read-only memory maps."""
    return CandidatePool(np.load(f"{path}-videos.npy", mmap_mode="r"), np.load(f"{path}-days.npy", mmap_mode="r"))


def _place(key: np.ndarray, found: np.ndarray, exposed: np.ndarray) -> np.ndarray:
    """Move the exposed videos, the first of each row of `found`, to random positions by K Fisher–Yates steps.

    Returns:
      The positions of the exposed videos [R, K] int32, −1 where there is none.
    """
    (r, c), k = found.shape, exposed.shape[1]
    step = np.arange(k)
    other = step + _draw(mix(key ^ _GOLDEN), k, (c - step).astype(np.uint64))
    first = np.arange(r) * c
    place = np.tile(np.arange(c, dtype=np.int32), r)
    for i in range(k):
        here, there = first + i, first + other[:, i]
        place[here], place[there] = place[there], place[here]
    # A video that no step has moved is already in place.
    moved = first[:, None] + np.concatenate([np.broadcast_to(step, (r, k)), other], axis=1)
    flat = found.reshape(-1)
    flat[first[:, None] + place[moved]] = flat[moved]
    return np.where(exposed >= 0, place.reshape(r, c)[:, :k], -1)
