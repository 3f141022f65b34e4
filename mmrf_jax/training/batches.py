"""Batches of a round's log, either held in memory or streamed from disk during training."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from mmrf_jax import types
from mmrf_jax.data import sessions, stream
from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.parallel import multihost
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import configs

_HELD_OUT = 20  # one session in this many is left out of the fit, to measure the feedback model
_SAMPLED = 160  # blocks sampled from a streamed log where a sample is enough
_SHARE = 99  # RNG tag: separates the draw of `feedback.log_fraction` from other draws of a seed
_PARTS = ("feedback", "train")  # config sections with a batch size: the fit and the updates


class Batches(Protocol):
    """The training data of a round.

    Attributes:
      sessions: number of sessions in the whole log.
      requests: number of requests in the whole log.
    """

    sessions: int
    requests: int

    @property
    def log(self) -> Sessions:
        """Return the whole log, or a sample that is the same in all processes."""

    def known(self, discount: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the mean and standard deviation [S] of exposure feedback, and the mean return [S]."""

    def per_epoch(self, part: str) -> int:
        """Return the steps per epoch of the fit (`feedback`) or of the updates (`train`)."""

    def get(self, part: str, number: int, at: int) -> types.SessionBatch:
        """Return this process's rows of step `at` of a part in round `number`, as NumPy arrays."""

    def held_out(self) -> tuple[Sessions, np.ndarray]:
        """Return the sessions left out of the feedback model's fit: a log and rows of its `segment_index`."""


class PhaseIterator:
    """The batches of one phase of a round, from any of its steps on; it knows its position.

    Use it as a context manager: a thread makes the next batch meanwhile.

    Attributes:
      position: steps begun so far, those before a restart included; after a step, what `TrainState.done` counts of
        this phase.
      total: steps of the phase.
      number: of the round.
    """

    def __init__(self, data: Batches, part: str, number: int, epochs: int, done: int):
        """Begin after `done` steps of a phase of round `number`; `part` is as in `Batches.get`.

        Raises:
          ValueError: if the log has too few segments for a batch.
        """
        self.position, self.total, self.number = done, epochs * data.per_epoch(part), number
        self._get = functools.partial(data.get, part, number)
        self._stack = contextlib.ExitStack()

    @property
    def progress(self) -> float:
        """Return the fraction of the phase before the newest step."""
        return (self.position - 1) / self.total

    def __enter__(self) -> PhaseIterator:
        self._batches = self._stack.enter_context(stream.ahead(self._get, self.position, self.total))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> PhaseIterator:
        return self

    def __next__(self) -> types.SessionBatch:
        batch = next(self._batches)
        self.position += 1
        return batch


def example(spec: InputSpec, size: int, num_requests: int) -> types.SessionBatch:
    """Return a batch of zeros with the shapes and types of a run's batches of `size` segments, for compilation."""
    t, h, k, s = num_requests + 1, spec.history, spec.slate, len(spec.signals)

    def zeros(dtype, *shape):
        return np.zeros((size, *shape), dtype)

    return types.SessionBatch(
        user_id=zeros(np.int32),
        date=zeros(np.int32),
        profile=zeros(np.float32, spec.profile),
        history=types.Exposure(zeros(np.int32, h), zeros(np.float32, h, s), zeros(bool, h)),
        context=zeros(np.float32, t, spec.context),
        candidates=zeros(np.int32, t, spec.candidates),
        slate=zeros(np.int32, t, k),
        slate_mask=zeros(bool, t, k),
        feedback=zeros(np.float32, t, k, s),
        log_propensity=zeros(np.float32, t),
        mask=zeros(bool, t),
        terminated=zeros(bool, t),
        truncated=zeros(bool, t),
    )


class Held:
    """A log in memory, complete in each process; every epoch is a permutation of its segments."""

    def __init__(self, config: configs.Run, log: Sessions, partitioner: Partitioner):
        self._config, self._partitioner, self.log = config, partitioner, log
        self.sessions, self.requests = log.num_sessions, log.num_requests
        index = sessions.segment_index(log, config.train.segment)
        fit, self._held = _fit_index(config, index)
        self._rows = {"feedback": fit, "train": index}

    def known(self, discount: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return known(self.log, discount)

    def per_epoch(self, part: str) -> int:
        return _per_epoch(self._config, part, len(self._rows[part]), self._partitioner)

    def get(self, part: str, number: int, at: int) -> types.SessionBatch:
        rows, size = self._rows[part], getattr(self._config, part).batch
        epoch, position = divmod(at, len(rows) // size)
        order = _order(self._config.seed, number, part, epoch, len(rows))
        chosen = rows[order[position * size : (position + 1) * size]]
        return sessions.gather_segments(self.log, self._partitioner.local_rows(chosen), self._config.train.segment)

    def held_out(self) -> tuple[Sessions, np.ndarray]:
        return self.log, self._held


def spread(log: Sessions, rows: np.ndarray, num_requests: int, size: int, most: int) -> Iterator[types.SessionBatch]:
    """Yield at most `most` batches of `size` segments, spread evenly over rows of a `segment_index`.

    A batch that would be short is padded by repetition.
    """
    rows = rows[:: max(len(rows) // (most * size), 1)]
    blocks = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
    if len(rows) and not blocks:
        blocks = [np.resize(rows, (size, 2))]
    for block in blocks[:most]:
        yield sessions.gather_segments(log, block, num_requests)


def known(log: Sessions, discount: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean and standard deviation [S] of a log's exposure feedback, and the mean return [S]."""
    feedback = log.feedback[log.slate >= 0].astype(np.float64)
    return feedback.mean(0), feedback.std(0), sessions.mean_return(log, discount)


class Streamed:
    """A streamed log (`data.stream`); each process reads its own part."""

    def __init__(
        self, config: configs.Run, blocks: stream.Blocks, partitioner: Partitioner, discount: float, num_signals: int
    ):
        """Compute the sums of the log and the segments per epoch.

        Raises:
          ValueError: if the log has too few sessions for the batches.
        """
        self._config, self._partitioner, self._blocks = config, partitioner, blocks
        sums = _Sums(discount, num_signals)
        slots = {part: partitioner.local_rows(np.arange(getattr(config, part).batch)) for part in _PARTS}
        share = (int(slots["train"][0]) // len(slots["train"]), config.train.batch // len(slots["train"]))
        self._part = stream.Part(blocks, config.seed, share, sums.add)
        self._sums = np.sum(multihost.gather_rows([sums.values[None]])[0], axis=0)
        self.sessions, self.requests = self._part.total, int(self._sums[0])
        kept = {"feedback": self._fitted(self._part.number), "train": np.ones(len(self._part.number), bool)}

        def make(part, number):
            return stream.Batches(
                self._part,
                slots[part],
                getattr(config, part).batch,
                config.train.segment,
                kept[part],
                [config.seed, number, part == "feedback"],
            )

        self._make = functools.lru_cache(maxsize=1)(make)  # memory holds the segments of one phase only
        self._segments = {part: self._counted(part) for part in _PARTS}

    def _counted(self, part: str) -> int:
        (segments,) = multihost.gather_rows([self._make(part, 0).segments])
        if not segments.all():
            fix = f"use a smaller --config.{part}.batch or a larger log"
            raise ValueError(
                f"{self.sessions} sessions give no segment to some of {len(segments)} slots of a batch; {fix}"
            )
        return int(segments.sum())

    def _fitted(self, number: np.ndarray) -> np.ndarray:
        """Return a mask of the sessions, given by their numbers in the log, that the feedback model is fitted on."""
        if self.sessions < _HELD_OUT:
            return np.ones(len(number), bool)
        fitted, share = number % _HELD_OUT != _HELD_OUT - 1, self._config.feedback.log_fraction
        if share < 1.0:
            fitted &= np.random.default_rng([self._config.seed, _SHARE]).random(self.sessions)[number] < share
        return fitted

    def known(self, discount: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        del discount  # `_Sums` already applied it
        requests, exposures, *sums = self._sums
        total, squares, returns = np.split(np.array(sums), 3)
        mean = total / exposures
        return mean, np.sqrt(np.maximum(squares / exposures - mean**2, 0.0)), returns / requests

    def per_epoch(self, part: str) -> int:
        return _per_epoch(self._config, part, self._segments[part], self._partitioner)

    def get(self, part: str, number: int, at: int) -> types.SessionBatch:
        return self._make(part, number).get(*divmod(at, self.per_epoch(part)))

    @functools.cached_property
    def _sample(self) -> tuple[Sessions, np.ndarray]:
        """Read blocks spread evenly over the log; also return the numbers of their sessions in the log."""
        chosen = np.unique(np.linspace(0, len(self._blocks.sessions) - 1, _SAMPLED).astype(int))
        starts = np.cumsum(self._blocks.sessions, dtype=np.int64) - self._blocks.sessions
        number = sessions.ragged_arange(starts[chosen], self._blocks.sessions[chosen])
        return self._blocks.read(chosen), number

    @property
    def log(self) -> Sessions:
        return self._sample[0]

    def held_out(self) -> tuple[Sessions, np.ndarray]:
        log, number = self._sample
        index = sessions.segment_index(log, self._config.train.segment)
        held = number[index[:, 0]] % _HELD_OUT == _HELD_OUT - 1
        return log, index[held] if held.any() else index


class _Sums:
    """Accumulated requests, exposures, and sums of feedback, squared feedback and returns, in float64."""

    def __init__(self, discount: float, num_signals: int):
        self._discount = discount
        self.values = np.zeros(2 + 3 * num_signals)

    def add(self, log: Sessions) -> None:
        feedback = log.feedback[log.slate >= 0].astype(np.float64)
        returns = log.num_requests * sessions.mean_return(log, self._discount)
        here = ([log.num_requests, len(feedback)], feedback.sum(0), (feedback**2).sum(0), returns)
        self.values += np.concatenate(here)


def _fit_index(config: configs.Run, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split segments into those for the feedback model's fit and those left out to measure it (every 20th session)."""
    left_out = index[:, 0] % _HELD_OUT == _HELD_OUT - 1
    if left_out.all() or not left_out.any():
        return index, index
    fit, held = index[~left_out], index[left_out]
    share = config.feedback.log_fraction
    if share < 1.0:
        fit = fit[np.random.default_rng([config.seed, _SHARE]).random(int(index[:, 0].max()) + 1)[fit[:, 0]] < share]
    return fit, held


def _per_epoch(config: configs.Run, part: str, segments: int, partitioner: Partitioner) -> int:
    batch = getattr(config, part).batch
    if segments < batch:
        fits = segments // partitioner.num_devices * partitioner.num_devices
        fix = f"use --config.{part}.batch={fits}" if fits else "use a larger log"
        raise ValueError(f"the log has {segments} segments for {part}, fewer than one batch of {batch}; {fix}")
    return segments // batch


@functools.lru_cache(maxsize=2)
def _order(seed: int, number: int, part: str, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, number, part == "feedback", epoch]).permutation(size)
