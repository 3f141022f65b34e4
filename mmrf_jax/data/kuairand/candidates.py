"""Candidates of a request: the videos it exposed and others drawn uniformly from the pool that was live that day.

KuaiRand does not log what a request could have shown. The draws are a hash of (seed, request), so they depend neither
on the order nor on the presence of other requests.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 finaliser: uint64 to uint64, every output bit depends on every input bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def request_keys(seed: int, *parts: np.ndarray) -> np.ndarray:
    """[R] uint64 keys of requests, from the seed and integers [R] that identify a request."""
    key: np.ndarray = np.full(len(parts[0]), seed, np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            key = mix(key + _GOLDEN) ^ part.astype(np.uint64)
        return mix(key + _GOLDEN)


def _draw(key: np.ndarray, first: int, count: int, size: np.ndarray) -> np.ndarray:
    """Numbers `first` … `first + count − 1` of every key's stream, uniform in [0, size): [R, count] int64."""
    with np.errstate(over="ignore"):
        counter = np.arange(first + 1, first + count + 1, dtype=np.uint64) * _GOLDEN
        bits = mix(key[:, None] + counter) >> np.uint64(32)
        return ((bits * size.astype(np.uint64)[:, None]) >> np.uint64(32)).astype(np.int64)


class Pool:
    """The videos that are live on each day: those whose first day is that day or before it."""

    def __init__(self, live_from: np.ndarray, never: int):
        """Args: live_from: [V] int32 first day of every item row; rows with `never` are in no pool."""
        order = np.argsort(live_from, kind="stable")
        days = live_from[order]
        self.size = int(np.searchsorted(days, never))
        self._order = order[: self.size].astype(np.int32)
        self._days = days[: self.size]

    def live(self, dates: np.ndarray) -> np.ndarray:
        """[R] int64 number of videos live on dates [R]."""
        return np.searchsorted(self._days, dates, side="right")

    def videos(self, date: int) -> np.ndarray:
        """Item rows live on a day."""
        return self._order[: int(self.live(np.array(date)))]

    def check(self, dates: np.ndarray, candidates: int) -> None:
        """Raises ValueError where fewer than `candidates` videos are live on one of the dates."""
        for date in np.unique(dates):
            live = len(self.videos(int(date)))
            if live < candidates:
                raise ValueError(
                    f"{live} videos are live on {date}, {candidates} candidates are asked for; "
                    f"set candidates to at most {live}"
                )

    def sample(
        self, key: np.ndarray, dates: np.ndarray, exposed: np.ndarray, candidates: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws the candidates of R requests.

        Args:
          key: [R] uint64, `request_keys`.
          dates: [R] the day of each request; `check` must accept them.
          exposed: [R, K] int32 item rows, different within a request; −1 where fewer were shown.
          candidates: C.

        Returns:
          Candidates [R, C] int32, all different, the exposed ones at random places; and slate [R, K] int32, the places
          of the exposed ones in the order given, −1 where there is none.
        """
        r, k = exposed.shape
        size = self.live(dates)
        found = np.empty((r, candidates), np.int32)
        absent = -1 - np.arange(k)  # different from each other, so that none counts as a repetition
        head = np.where(exposed >= 0, exposed, absent).astype(np.int64)
        todo, count = np.arange(r), candidates + candidates // 4 + 16
        while len(todo):
            others = self._order[_draw(key[todo], 0, count, size[todo])]
            drawn = np.concatenate([head[todo], others], axis=1)
            order = np.argsort(drawn, axis=1, kind="stable")
            ranked = np.take_along_axis(drawn, order, 1)
            repeated = np.zeros(drawn.shape, bool)
            np.put_along_axis(repeated, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], 1)
            fresh = ~repeated & (drawn >= 0)
            rank = np.cumsum(fresh, axis=1)
            enough = rank[:, -1] >= candidates
            fresh &= (rank <= candidates) & enough[:, None]
            found[todo[enough]] = drawn[fresh].reshape(-1, candidates)
            todo, count = todo[~enough], count * 2
        return _place(key, found, exposed)


def _place(key: np.ndarray, found: np.ndarray, exposed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves the exposed videos, the first of each row, to random places: K steps of a Fisher–Yates shuffle."""
    r, c = found.shape
    k = exposed.shape[1]
    rows = np.arange(r)
    place = np.broadcast_to(np.arange(c, dtype=np.int32), (r, c)).copy()
    stream = mix(key ^ _GOLDEN)
    for i in range(k):
        other = i + _draw(stream, i, 1, np.full(r, c - i))[:, 0]
        place[rows, i], place[rows, other] = place[rows, other], place[rows, i].copy()
    placed = np.empty_like(found)
    np.put_along_axis(placed, place, found, 1)
    shown = exposed >= 0
    nth = np.cumsum(shown, axis=1) - 1
    slate = np.where(shown, np.take_along_axis(place, np.maximum(nth, 0), 1), -1)
    return placed, slate.astype(np.int32)
