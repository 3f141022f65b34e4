"""One thread that scores; it takes as a batch all requests that arrived while it scored the previous batch."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmrf_jax.serving import monitoring, ranker
from mmrf_jax.serving.ranker import Job, Ranker


class Scorer:
    """The queue of jobs; one event loop uses it, and runs `work` as a task."""

    def __init__(self, metrics: monitoring.Metrics):
        self._metrics = metrics
        self._queue: collections.deque[tuple[Ranker, Job, asyncio.Future]] = collections.deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "score")

    async def score(self, serving: Ranker, job: Job) -> Any:
        """Return what `Ranker.run` does for a job."""
        future = asyncio.get_running_loop().create_future()
        self._queue.append((serving, job, future))
        self._arrived.set()
        return await future

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the scoring thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def work(self) -> None:
        while True:
            await self._arrived.wait()
            batch: list[tuple[Ranker, Job, asyncio.Future]] = []
            while self._queue and len(batch) < ranker.BATCHES[-1]:
                if batch and self._queue[0][0] is not batch[0][0]:
                    break  # for another artefact
                one = self._queue.popleft()
                if not one[2].done():  # otherwise its caller has stopped waiting
                    batch.append(one)
            if not self._queue:
                self._arrived.clear()
            if not batch:
                continue
            self._metrics.batch.observe(len(batch))
            serving, jobs, began = batch[0][0], [job for _, job, _ in batch], time.perf_counter()
            try:
                answers: list[Any] = await self.run(serving.run, jobs)
            except Exception as error:  # of this batch alone; the next may succeed
                for _, _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            self._metrics.scoring.inc(time.perf_counter() - began)
            for (_, _, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    def close(self) -> None:
        self._thread.shutdown()
