"""Engines that run the tasks of `prepare` on this machine, in this process or in several child processes.

Processes are started as `python -m` of this module, not by `multiprocessing`. That would run the caller's main module
again in each, and leave them running if the caller is killed. These end when the pipe with their tasks closes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from mmrf_jax.data.readers.kuairand.job import Engine, Job, Task

#: Default limit. Each further process takes about 0.7 GiB; with two the 32 million videos of 27K fit into 4 GiB.
MOST_WORKERS = 2


def default_workers() -> int:
    """Return one process per core that this process may use, at most `MOST_WORKERS`."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


@contextlib.contextmanager
def processes(workers: int | None = None) -> Iterator[Engine]:
    """Return a context with an engine of child processes; a single task runs in this process.

    Args:
      workers: number of processes, `default_workers()` by default; 1 uses this process.
    """
    workers = workers or default_workers()
    with contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        threads = ThreadPoolExecutor(workers)

        def engine(task: Task, job: Job, todo: Sequence[int], done: Callable[[int], None]) -> None:
            if workers == 1 or (len(todo) == 1 and idle.empty()):  # no need to start processes
                for ended, i in enumerate(todo, 1):
                    task(job, i)
                    done(ended)
                return
            while idle.qsize() < workers:
                idle.put(stack.enter_context(_Worker()))

            def run(i: int) -> None:
                worker = idle.get()
                try:
                    worker.run(task, job, i)
                finally:
                    idle.put(worker)

            futures = [threads.submit(run, i) for i in todo]
            for ended, future in enumerate(as_completed(futures), 1):
                future.result()
                done(ended)

        try:
            yield engine
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """A process that runs one task at a time; it is killed at the end of the context."""

    def __enter__(self) -> _Worker:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C goes to the caller, which ends this process
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, task: Task, job: Job, i: int) -> None:
        """Run a task; raise what the task raised, or ChildProcessError if the process ended."""
        assert self._process.stdin and self._process.stdout
        try:
            pickle.dump((task, job, i), self._process.stdin)
            self._process.stdin.flush()
            error = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            raise ChildProcessError(
                f"the process of task {i} of {task.__name__} ended with {self._process.wait()}; if memory was short, "
                "use fewer workers"
            ) from None
        if error is not None:
            raise error


def _environment() -> dict[str, str]:
    # Freed memory stays for the next task: glibc (NumPy) and jemalloc (polars) would return it to the system, and new
    # page faults took a tenth of all time. Columns of ten million videos are excluded, since they are used once.
    return os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(2**26),
        "MALLOC_TRIM_THRESHOLD_": str(2**30),
        "_RJEM_MALLOC_CONF": "dirty_decay_ms:2000,muzzy_decay_ms:2000,thp:always",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "POLARS_MAX_THREADS": "1",  # one core per process
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # modules that this process can import
    }


def _serve() -> None:
    """Run the tasks that arrive on stdin, and write None or an exception for each to stdout."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # prints go to stderr
        while True:
            try:
                task, job, i = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            try:
                task(job, i)
                answer = None
            except Exception as error:
                answer = error
            pickle.dump(answer, answers)
            answers.flush()


if __name__ == "__main__":
    _serve()
