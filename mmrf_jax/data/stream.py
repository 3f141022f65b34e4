"""Training batches from a log of any size, read on demand; each process reads only its part of the log.

A batch has B slots. The blocks of a log are shuffled and its sessions cut into B equal shards; slot j of every batch
takes its segments from shard j. The contents of a batch thus depend only on the seed and the batch number, not on the
number of processes, and a process reads only the shards of its slots. Within a shard each pass shuffles the blocks and
the segments in each block. Memory holds one block per slot and one number per session.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, Protocol

import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.data import sessions
from mmrf_jax.data.session_log import Sessions

_SHUFFLE = 101  # separates the block order from other random draws of a seed


class Blocks(Protocol):
    """Sessions on disk, in blocks that can be read one by one."""

    sessions: np.ndarray  # [blocks] int, sessions per block

    def read(self, blocks: Sequence[int] | np.ndarray) -> Sessions:
        """Read the sessions of some blocks, in the given order."""


def spread_blocks(blocks: Blocks, number: int) -> np.ndarray:
    """Return positions of blocks, evenly spaced over a log, with about `number` sessions in total (at most all)."""
    count, total = len(blocks.sessions), int(blocks.sessions.sum(dtype=np.int64))
    chosen = count if total <= number else max(count * number // total, 1)
    return np.arange(chosen) * count // max(chosen, 1)


class Beginning:
    """The first `number` sessions of a log."""

    def __init__(self, blocks: Blocks, number: int):
        self._blocks = blocks
        before = np.cumsum(blocks.sessions, dtype=np.int64) - blocks.sessions
        left = np.clip(number - before, 0, blocks.sessions)
        self.sessions = left[left > 0]

    def read(self, blocks: Sequence[int] | np.ndarray) -> Sessions:
        """Read the sessions of some blocks, in the given order."""
        log = self._blocks.read(blocks)
        sizes = self._blocks.sessions[: len(self.sessions)][blocks].astype(np.int64)
        if (sizes == self.sessions[blocks]).all():
            return log
        starts = np.cumsum(sizes) - sizes
        return sessions.select_sessions(log, sessions.ragged_arange(starts, self.sessions[blocks]))


class LogPart:
    """The sessions of a log that this process trains on: a range of the shuffled blocks.

    Attributes:
      total: number of sessions of the whole log.
      first, last: range of this process's sessions, in shuffled order.
      number: [last - first] int64 index of each session in the log.
      requests: [last - first] int32 number of requests of each session.
    """

    def __init__(self, blocks: Blocks, seed: int, share: tuple[int, int], seen: Callable[[Sessions], None]):
        """Read all sessions of the part once.

        Args:
          blocks: the log.
          seed: seed of the block order.
          share: (p, P), this is part p of P.
          seen: called with every session of the part, once.

        Raises:
          ValueError: for a log without sessions.
        """
        self._blocks = blocks
        self._order = np.random.default_rng([seed, _SHUFFLE]).permutation(len(blocks.sessions))
        self._ends = np.cumsum(blocks.sessions[self._order], dtype=np.int64)
        self.total = int(self._ends[-1]) if len(self._ends) else 0
        if not self.total:
            raise ValueError("the log to train on has no sessions; use more days or another log")
        part, parts = share
        self.first, self.last = self.total * part // parts, self.total * (part + 1) // parts
        starts = np.cumsum(blocks.sessions, dtype=np.int64) - blocks.sessions
        numbers, requests = [], []
        for block, first, last in self.pieces(self.first, self.last):
            log = self.read(block, first, last)
            seen(log)
            numbers.append(starts[block] + np.arange(first, last))
            requests.append(np.diff(log.offsets).astype(np.int32))
        self.number = np.concatenate([np.zeros(0, np.int64), *numbers])
        self.requests = np.concatenate([np.zeros(0, np.int32), *requests])

    def pieces(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Return (block, first, last session in it) for a range of sessions in shuffled order."""
        found = []
        for at in range(int(np.searchsorted(self._ends, first, side="right")), len(self._ends)):
            block = int(self._order[at])
            begin = int(self._ends[at] - self._blocks.sessions[block])
            if begin >= last:
                break
            found.append((block, max(first - begin, 0), int(min(last, self._ends[at]) - begin)))
        return [piece for piece in found if piece[1] < piece[2]]

    def read(self, block: int, first: int, last: int) -> Sessions:
        """Read a range of sessions of a block."""
        return sessions.select_sessions(self._blocks.read([block]), np.arange(first, last))


class BatchRows:
    """The rows of each batch that belong to this process.

    Attributes:
      segments: [slots] int64 number of segments in the shard of each of this process's slots.
    """

    def __init__(
        self, part: LogPart, slots: np.ndarray, batch: int, num_requests: int, kept: np.ndarray, seed: Sequence
    ):
        """Assign shards of the part to slots.

        Args:
          part: the sessions of this process.
          slots: [n] int, this process's slots of the batch.
          batch: number of slots of the whole batch, B.
          num_requests: T of a segment.
          kept: [sessions of the part] bool, the sessions to train on.
          seed: seed of the orders.
        """
        self._part, self._slots, self._num_requests, self._kept = part, slots, num_requests, kept
        self._seed = [int(x) for x in seed]
        self._pieces: list[list[tuple[int, int, int, int]]] = []  # by slot: block, first, last, position in the part
        self._counts: list[np.ndarray] = []  # by slot: segments of each piece
        segments = np.where(kept, -(-part.requests // num_requests), 0)
        for slot in slots:
            at, pieces = part.total * int(slot) // batch, []
            for block, first, last in part.pieces(at, part.total * (int(slot) + 1) // batch):
                pieces.append((block, first, last, at - part.first))
                at += last - first
            self._pieces.append(pieces)
            self._counts.append(np.array([segments[p : p + last - first].sum() for _, first, last, p in pieces], int))
        self.segments = np.array([counts.sum() for counts in self._counts], np.int64)
        self._passes: list[_Pass] = [_Pass(-1)] * len(slots)

    def get(self, epoch: int, position: int) -> types.SessionBatch:
        """Return this process's rows [n, T + 1, ...] of a batch of an epoch."""
        rows = [self._segment(i, epoch, position) for i in range(len(self._slots))]
        return jax.tree.map(lambda *x: np.stack(x), *rows)

    def _segment(self, i: int, epoch: int, position: int) -> types.SessionBatch:
        if self._passes[i].epoch != epoch:
            self._passes[i] = self._begin(i, epoch)
        now = self._passes[i]
        at = (now.start + position) % int(now.ends[-1])
        turn = int(np.searchsorted(now.ends, at, side="right"))
        piece = int(now.order[turn])
        if now.piece != piece:
            now.piece, now.segments = piece, self._load(i, epoch, piece)
        row = at - int(now.ends[turn]) + int(self._counts[i][piece])
        return jax.tree.map(lambda x: x[row], now.segments)

    def _begin(self, i: int, epoch: int) -> _Pass:
        rng = np.random.default_rng([*self._seed, epoch, int(self._slots[i])])
        order = rng.permutation(len(self._pieces[i]))
        ends = np.cumsum(self._counts[i][order])
        return _Pass(epoch, order, ends, int(rng.integers(ends[-1])))

    def _load(self, i: int, epoch: int, piece: int) -> types.SessionBatch:
        """Load all segments of a piece, in the order of a pass."""
        block, first, last, place = self._pieces[i][piece]
        log = self._part.read(block, first, last)
        index = sessions.segment_index(log, self._num_requests)
        index = index[self._kept[place + index[:, 0]]]
        rng = np.random.default_rng([*self._seed, epoch, int(self._slots[i]), piece])
        return sessions.gather_segments(log, rng.permutation(index), self._num_requests)


@dataclasses.dataclass
class _Pass:
    """A pass over a shard: the order of its pieces, the cumulative number of segments, and where the pass begins.

    The pass wraps around from its start, so that not all slots reach the end of a block at once.
    """

    epoch: int
    order: Any = None
    ends: Any = None
    start: int = 0
    piece: int = -1  # the one in memory
    segments: Any = None


@contextlib.contextmanager
def prefetch(make: Callable[[int], Any], first: int, last: int) -> Iterator[Iterator[Any]]:
    """Return a context with an iterator of `make(first)` … `make(last - 1)`; a thread makes the next one in advance."""

    def results() -> Iterator[Any]:
        pending = pool.submit(make, first)
        for at in range(first, last):
            made = pending.result()
            if at + 1 < last:
                pending = pool.submit(make, at + 1)
            yield made

    with futures.ThreadPoolExecutor(1) as pool:
        yield results() if first < last else iter(())
