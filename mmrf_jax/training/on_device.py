"""A round's log on the devices as batches: a small program gathers each, and no step waits for the host."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.data import device_log
from mmrf_jax.data.device_log import DeviceLog, Layout, Rows
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.parallel import multihost
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import batches, configs

_SAMPLE = 4_096  # sessions that evaluators of a round may look at


class DeviceBatches:
    """A log on the devices as `batches.Batches`: the segments of `batches.InMemoryBatches`, in the same order.

    The host only draws the order of an epoch, and copies it to the devices at its beginning.
    """

    def __init__(self, config: configs.Run, log: DeviceLog, partitioner: Partitioner):
        self._config, self._partitioner, self._log = config, partitioner, log
        self.sessions, self.requests = log.num_sessions, log.num_requests
        index = log.segment_index(config.train.segment)
        fit, self._held = batches.fit_index(config, index)
        self._index = {"feedback": fit, "train": index}
        self.segments = len(index)

    @functools.cached_property
    def log(self) -> Sessions:
        return self._log.head(_SAMPLE)

    def feedback_statistics(self, discount: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        del discount  # the log was summed with it
        return self._log.feedback_statistics

    def per_epoch(self, part: str) -> int:
        return batches.steps_per_epoch(self._config, part, len(self._index[part]), self._partitioner)

    @contextlib.contextmanager
    def steps(
        self, part: str, number: int, first: int, lr_scales: np.ndarray
    ) -> Iterator[Iterator[tuple[types.SessionBatch, Any]]]:
        yield self._steps(part, number, first, lr_scales)

    def _steps(
        self, part: str, number: int, first: int, lr_scales: np.ndarray
    ) -> Iterator[tuple[types.SessionBatch, Any]]:
        size, per_epoch = getattr(self._config, part).batch, self.per_epoch(part)
        next_step = _next_step(self._log.layout, size, self._config.train.segment, self._partitioner)
        while first < len(lr_scales):
            epoch, position = divmod(first, per_epoch)
            order, factors = self._epoch(part, number, epoch), lr_scales[epoch * per_epoch : (epoch + 1) * per_epoch]
            here = self._partitioner.replicate((_padded(order), _padded(factors), np.int32(position)))
            *schedule, at = here
            for _ in range(position, len(factors)):
                batch, lr_scale, at = next_step(self._log.rows, *schedule, at)
                yield batch, lr_scale
            first = (epoch + 1) * per_epoch

    def _epoch(self, part: str, number: int, epoch: int) -> np.ndarray:
        """Return the segments of an epoch in their order."""
        index = self._index[part]
        return index[batches.epoch_order(self._config.seed, number, part, epoch, len(index))]

    def held_out(self, size: int, most: int, exposures: int) -> Iterator[types.SessionBatch]:
        assert exposures == 1  # `rounds` refuses others before the log is there
        gather = _gather(self._log.layout, self._config.train.segment, self._partitioner)
        for index in batches.spread_rows(self._held, size, most):
            batch = gather(self._log.rows, self._partitioner.replicate(index))
            yield jax.tree.map(multihost.fetch, batch)


def _padded(x: np.ndarray) -> np.ndarray:
    """Pad the first axis with zeros, so that epochs of similar logs share a program."""
    return np.pad(x, ((0, device_log.padded_size(len(x)) - len(x)), *((0, 0),) * (x.ndim - 1)))


@functools.cache
def _next_step(layout: Layout, size: int, num_requests: int, partitioner: Partitioner) -> Callable[..., Any]:
    """Return a program: (rows of the log, segments of an epoch, its lr_scales, step) -> batch, lr_scale, next step."""

    def next_step(rows: Rows, order: chex.Array, lr_scales: chex.Array, at: chex.Array):
        index = jax.lax.dynamic_slice_in_dim(order, at * size, size)
        batch = device_log.gather(layout, rows, index, num_requests, partitioner)
        return batch, lr_scales[at], at + 1

    numbers = partitioner.replicated_sharding
    return jax.jit(next_step, out_shardings=(partitioner.data_sharding, numbers, numbers))


@functools.cache
def _gather(layout: Layout, num_requests: int, partitioner: Partitioner) -> Callable[..., types.SessionBatch]:
    def gather(rows: Rows, index: chex.Array):
        return device_log.gather(layout, rows, index, num_requests, partitioner)

    return jax.jit(gather, out_shardings=partitioner.data_sharding)
