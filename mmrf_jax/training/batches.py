"""Batches of a round's log, either held in memory or streamed from disk during training."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

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

    def feedback_statistics(self, discount: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the mean and standard deviation [S] of exposure feedback, and the mean return [S]."""

    def per_epoch(self, part: str) -> int:
        """Return the steps per epoch of the fit (`feedback`) or of the updates (`train`)."""

    def steps(self, part: str, number: int, first: int, lr_scales: np.ndarray) -> Steps:
        """Return a context with an iterator of the steps of a part in round `number`, from `first` on.

        Each is a batch, split over all devices, and the step's entry of `lr_scales`.
        """

    def held_out(self, size: int, most: int, exposures: int) -> Iterator[types.SessionBatch]:
        """Yield batches of `size` segments left out of the feedback model's fit; see `measured_batches`."""


#: A context with an iterator of batches and learning-rate factors.
Steps = contextlib.AbstractContextManager[Iterator[tuple[types.SessionBatch, Any]]]


class PhaseIterator:
    """The batches of one phase of a round and their learning-rate factors, from any of its steps on.

    It knows its position. Use it as a context manager: a thread may make the next batch meanwhile.

    Attributes:
      position: steps begun so far, those before a restart included; after a step, what `TrainState.done` counts of
        this phase.
      total: steps of the phase.
      number: of the round.
    """

    def __init__(
        self, data: Batches, part: str, number: int, epochs: int, done: int, lr_scale_at: Callable[[float], float]
    ):
        """Begin after `done` steps of a phase.

        Args:
          data: of the round.
          part: `feedback` for the fit, or `train` for the updates.
          number: of the round.
          epochs: over the data.
          done: steps before.
          lr_scale_at: gives the learning-rate factor of a step by the fraction of the phase before it.

        Raises:
          ValueError: if the log has too few segments for a batch.
        """
        self.position, self.total, self.number = done, epochs * data.per_epoch(part), number
        lr_scales = np.array([lr_scale_at(at / self.total) for at in range(self.total)], np.float32)
        self._steps = functools.partial(data.steps, part, number, done, lr_scales)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PhaseIterator:
        self._batches = self._stack.enter_context(self._steps())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> PhaseIterator:
        return self

    def __next__(self) -> tuple[types.SessionBatch, Any]:
        step = next(self._batches)
        self.position += 1
        return step


@contextlib.contextmanager
def _from_host(
    get: Callable[[int], types.SessionBatch], first: int, lr_scales: np.ndarray, partitioner: Partitioner
) -> Iterator[Iterator[tuple[types.SessionBatch, Any]]]:
    """Return a context with the steps of a phase whose batches `get(step)` makes on the host, this process's rows."""
    with stream.prefetch(get, first, len(lr_scales)) as made:
        yield ((partitioner.shard_inputs(batch), lr_scales[first + i]) for i, batch in enumerate(made))


def example_batch(spec: InputSpec, size: int, num_requests: int) -> types.SessionBatch:
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


class InMemoryBatches:
    """A log in memory, complete in each process; every epoch is a permutation of its segments."""

    def __init__(self, config: configs.Run, log: Sessions, partitioner: Partitioner):
        self._config, self._partitioner, self.log = config, partitioner, log
        self.sessions, self.requests = log.num_sessions, log.num_requests
        index = sessions.segment_index(log, config.train.segment)
        fit, self._held = fit_index(config, index)
        self._rows = {"feedback": fit, "train": index}

    def feedback_statistics(self, discount: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return feedback_statistics(self.log, discount)

    def per_epoch(self, part: str) -> int:
        return steps_per_epoch(self._config, part, len(self._rows[part]), self._partitioner)

    def get(self, part: str, number: int, at: int) -> types.SessionBatch:
        """Return this process's rows of step `at` of a part in round `number`."""
        rows, size = self._rows[part], getattr(self._config, part).batch
        epoch, position = divmod(at, len(rows) // size)
        order = epoch_order(self._config.seed, number, part, epoch, len(rows))
        chosen = rows[order[position * size : (position + 1) * size]]
        return sessions.gather_segments(self.log, self._partitioner.local_rows(chosen), self._config.train.segment)

    def steps(self, part: str, number: int, first: int, lr_scales: np.ndarray) -> Steps:
        return _from_host(functools.partial(self.get, part, number), first, lr_scales, self._partitioner)

    def held_out(self, size: int, most: int, exposures: int) -> Iterator[types.SessionBatch]:
        return measured_batches(self.log, self._held, self._config.train.segment, size, most, exposures)


def measured_batches(
    log: Sessions, index: np.ndarray, num_requests: int, size: int, most: int, exposures: int
) -> Iterator[types.SessionBatch]:
    """Yield at most `most` batches per kind of exposure, spread over rows of a `segment_index`."""
    random = np.zeros(len(index), bool)
    if exposures == 2:
        random = types.exposed_at_random(log.context[log.offsets[index[:, 0]]])
    for part in (index[~random], index[random]):
        yield from spread_batches(log, part, num_requests, size, most)


def spread_batches(
    log: Sessions, rows: np.ndarray, num_requests: int, size: int, most: int
) -> Iterator[types.SessionBatch]:
    """Yield at most `most` batches of `size` segments, spread evenly over rows of a `segment_index`.

    A batch that would be short is padded by repetition.
    """
    for block in spread_rows(rows, size, most):
        yield sessions.gather_segments(log, block, num_requests)


def spread_rows(rows: np.ndarray, size: int, most: int) -> list[np.ndarray]:
    """Return the rows of each batch of `spread_batches`."""
    rows = rows[:: max(len(rows) // (most * size), 1)]
    blocks = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
    if len(rows) and not blocks:
        blocks = [np.resize(rows, (size, rows.shape[1]))]
    return blocks[:most]


def feedback_statistics(log: Sessions, discount: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean and standard deviation [S] of a log's exposure feedback, and the mean return [S]."""
    feedback = log.feedback[log.slate >= 0].astype(np.float64)
    return feedback.mean(0), feedback.std(0), sessions.mean_return(log, discount)


class StreamedBatches:
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
        self._part = stream.LogPart(blocks, config.seed, share, sums.add)
        self._sums = np.sum(multihost.gather_rows([sums.values[None]])[0], axis=0)
        self.sessions, self.requests = self._part.total, int(self._sums[0])
        kept = {"feedback": self._fitted(self._part.number), "train": np.ones(len(self._part.number), bool)}

        def make(part, number):
            return stream.BatchRows(
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

    def feedback_statistics(self, discount: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        del discount  # `_Sums` already applied it
        requests, exposures, *sums = self._sums
        total, squares, returns = np.split(np.array(sums), 3)
        mean = total / exposures
        return mean, np.sqrt(np.maximum(squares / exposures - mean**2, 0.0)), returns / requests

    def per_epoch(self, part: str) -> int:
        return steps_per_epoch(self._config, part, self._segments[part], self._partitioner)

    def get(self, part: str, number: int, at: int) -> types.SessionBatch:
        """Return this process's rows of step `at` of a part in round `number`."""
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

    def steps(self, part: str, number: int, first: int, lr_scales: np.ndarray) -> Steps:
        return _from_host(functools.partial(self.get, part, number), first, lr_scales, self._partitioner)

    def held_out(self, size: int, most: int, exposures: int) -> Iterator[types.SessionBatch]:
        log, number = self._sample
        segment = self._config.train.segment
        index = sessions.segment_index(log, segment)
        held = number[index[:, 0]] % _HELD_OUT == _HELD_OUT - 1
        return measured_batches(log, index[held] if held.any() else index, segment, size, most, exposures)


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


def fit_index(config: configs.Run, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split segments into those for the feedback model's fit and those left out to measure it (every 20th session)."""
    left_out = index[:, 0] % _HELD_OUT == _HELD_OUT - 1
    if left_out.all() or not left_out.any():
        return index, index
    fit, held = index[~left_out], index[left_out]
    share = config.feedback.log_fraction
    if share < 1.0:
        fit = fit[np.random.default_rng([config.seed, _SHARE]).random(int(index[:, 0].max()) + 1)[fit[:, 0]] < share]
    return fit, held


def steps_per_epoch(config: configs.Run, part: str, segments: int, partitioner: Partitioner) -> int:
    """Return the number of whole batches of a part.

    Raises:
      ValueError: if there is none.
    """
    batch = getattr(config, part).batch
    if segments < batch:
        fits = segments // partitioner.num_devices * partitioner.num_devices
        fix = f"use --config.{part}.batch={fits}" if fits else "use a larger log"
        raise ValueError(f"the log has {segments} segments for {part}, fewer than one batch of {batch}; {fix}")
    return segments // batch


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, number: int, part: str, epoch: int, size: int) -> np.ndarray:
    """Return the order of `size` segments in an epoch."""
    return np.random.default_rng([seed, number, part == "feedback", epoch]).permutation(size)
