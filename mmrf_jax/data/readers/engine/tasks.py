"""How tasks run, on any machine and any size of log: the job they share, engines, and an external sort.

A task is a function of a job and a number. Tasks exchange files through the job's work folder, and publish them by
renames, so running a task twice is safe. An engine runs the tasks of a stage: in this process, in several child
processes, or on Apache Beam, on several machines with a shared file system.

Child processes are started as `python -m` of this module, not by `multiprocessing`. That would run the caller's main
module again in each, and leave them running if the caller is killed. These end when the pipe with their tasks closes.

The external sort orders a frame of any size by an integer key. The frame is written as runs, one file per piece sorted
in memory. `cut_runs` divides the keys so that about as many rows lie between any two cuts, and `read_part` collects the
rows of all runs between two cuts. Rows of one key stay together.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import pickle
import queue
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
import polars as pl

from mmrf_jax.io import extras, files
from mmrf_jax.io.progress import Counter, say

#: Default limit. Each further process takes about 0.7 GiB; with two the 32 million videos of 27K fit into 4 GiB.
MOST_WORKERS = 2

_BATCH_ROWS = 16_384  # smallest number of rows to read from a file
_SAMPLES = 1_024  # keys sampled per part, to place the cuts


class TaskJob:
    """What to prepare and where, sent to the processes that run tasks: a frozen dataclass with the folder `work`.

    Attributes:
      work: folder of all outputs, the same for all processes.
    """

    work: pathlib.Path

    def path(self, stage: str, task: int, suffix: str = "arrow") -> pathlib.Path:
        """Return the path of a task's output in a stage."""
        return self.work / stage / f"{task:06d}.{suffix}"

    def made(self, stage: str, suffix: str = "arrow") -> list[pathlib.Path]:
        """Return the outputs of all tasks of a stage, in order."""
        return sorted((self.work / stage).glob(f"*.{suffix}"))

    def cuts(self, name: str) -> np.ndarray:
        """Return the output of `cut_runs` that was saved under a name."""
        return np.load(self.work / f"{name}.npy")

    def parts(self, name: str) -> int:
        """Return the number of parts of saved cuts."""
        return self.cuts(name).shape[1] - 1

    def cut(self, name: str, of: str, key: str, rows: int) -> None:
        """Cut the outputs of a stage into parts of about `rows` rows and save the cuts, unless they are there."""
        if not (self.work / f"{name}.npy").exists():
            publish_array(self.work / f"{name}.npy", cut_runs(self.made(of), key, rows))

    def read(self, name: str) -> Any:
        """Read a JSON file of the work folder."""
        return json.loads((self.work / name).read_text())

    def read_all(self, stage: str) -> list[Any]:
        """Read the JSON files of all tasks of a stage."""
        return [json.loads(path.read_text()) for path in self.made(stage, "json")]


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path in the folder of `path`, renamed to it at the end; concurrent writers do not interfere."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    yield temporary
    temporary.rename(path)


def publish_json(path: pathlib.Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with appearing(path) as temporary:
        temporary.write_text(json.dumps(value))


def publish_array(path: pathlib.Path, value: np.ndarray) -> None:
    """Write an npy file atomically; `path` ends in .npy."""
    with appearing(path) as temporary, open(temporary, "wb") as f:
        np.save(f, value)


#: A function of a job, of the class that it needs, and a number.
Task = Callable[[Any, int], None]
#: Runs a task for each of some numbers, in any order; `done` receives how many have ended.
Engine = Callable[[Task, TaskJob, Sequence[int], Callable[[int], None]], None]


def run_stage(
    job: TaskJob, engine: Engine, progress: Counter, name: str, task: Task, count: int, suffix: str = "json"
) -> None:
    """Run the tasks 0 … `count` − 1 of a stage whose output with the suffix is missing."""
    (job.work / name).mkdir(parents=True, exist_ok=True)
    todo = [i for i in range(count) if not job.path(name, i, suffix).exists()]
    if todo:
        before = count - len(todo)
        update = progress(f"prepare: {name}", count, done=before)
        engine(task, job, todo, lambda done: update(before + done))


@contextlib.contextmanager
def held_alone(work: pathlib.Path) -> Iterator[None]:
    """Hold the work folder for this process alone; wait for another that holds it, and may `discard` it."""
    patience = 0.0
    with contextlib.ExitStack() as stack:
        while True:
            work.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(files.held(work, patience))
                break
            except FileNotFoundError:  # its holder has discarded it meanwhile
                continue
            except ValueError:
                say(f"another process prepares {work.parent}; waiting for it")
                patience = math.inf
        yield


def discard(work: pathlib.Path) -> None:
    """Delete the work folder that this process holds, for others at once: one that waits for it begins a new one."""
    gone = work.with_name(f"{work.name}-{uuid.uuid4().hex}")
    work.rename(gone)
    shutil.rmtree(gone)


def make_folder(
    folder: pathlib.Path, key: str, engine: Engine | None, run: Callable[[pathlib.Path, Engine], pathlib.Path]
) -> None:
    """Make a folder, complete or not at all; after a stop, the same call runs the missing tasks.

    Args:
      folder: the folder; nothing is done if it exists.
      key: digits that differ if the folder would differ.
      engine: runs the tasks; None for `worker_processes()`.
      run: makes the folder within a work folder, and returns its path.

    Raises:
      ValueError: as `run`; nothing is left then, since to go on cannot help: tables or settings must change.
    """
    work = folder.with_name(f".{folder.name}.unfinished-{key}")
    with held_alone(work):
        if not folder.exists():  # another process may have made it meanwhile
            try:
                with contextlib.ExitStack() as stack:
                    run(work, engine or stack.enter_context(worker_processes())).rename(folder)
            except ValueError:
                discard(work)
                raise
        discard(work)


def default_workers() -> int:
    """Return one process per core that this process may use, at most `MOST_WORKERS`."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


@contextlib.contextmanager
def worker_processes(workers: int | None = None) -> Iterator[Engine]:
    """Return a context with an engine of child processes; a single task runs in this process.

    Args:
      workers: number of processes, `default_workers()` by default; 1 uses this process.
    """
    workers = workers or default_workers()
    with contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        threads = ThreadPoolExecutor(workers)

        def engine(task: Task, job: TaskJob, todo: Sequence[int], done: Callable[[int], None]) -> None:
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

    def run(self, task: Task, job: TaskJob, i: int) -> None:
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


def beam_pipelines(options: Sequence[str] = ()) -> Engine:
    """Return an engine of Apache Beam, which is an extra; each stage is a pipeline.

    Tasks of a stage are distributed, and repeated if a machine is lost.

    Args:
      options: options of the pipelines (`--runner=…`); Beam's local runner by default.

    Raises:
      MissingExtra: if Beam is not installed.
    """
    with extras.needed("beam"):
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

    def engine(task: Task, job: TaskJob, todo: Sequence[int], done: Callable[[int], None]) -> None:
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            tasks = pipeline | beam.Create(list(todo)) | beam.Reshuffle()
            tasks | beam.Map(lambda i: task(job, i))
        done(len(todo))

    return engine


def write_run(frame: pl.DataFrame, path: pathlib.Path) -> None:
    """Write a frame, sorted by its key, as a run; the file appears atomically."""
    with appearing(path) as temporary:
        # A third of the bytes; the disk would take longer than lz4 does.
        frame.write_ipc(temporary, compression="lz4", record_batch_size=_BATCH_ROWS)


def cut_runs(runs: Sequence[pathlib.Path], key: str, rows: int) -> np.ndarray:
    """Cut runs into parts of about `rows` rows, or of one key if it has more.

    Returns:
      [runs, parts + 1] int64: the first row of each part in each run, and the run's number of rows.
    """
    step = max(1, rows // _SAMPLES)
    with ThreadPoolExecutor(2) as threads:  # the keys may not fit in memory, so they are read twice

        def of_each(function: Callable[[np.ndarray], Any]) -> list:
            return list(threads.map(lambda run: function(read_column([run], key).to_numpy()), runs))

        sample = np.sort(np.concatenate(of_each(lambda keys: keys[step // 2 :: step].copy())))
        every = rows // step
        first = np.unique(sample[every : max(len(sample) - every // 2, 0) : every])
        return np.array(of_each(lambda keys: [0, *np.searchsorted(keys, first), len(keys)]))


def read_column(files: Sequence[pathlib.Path], name: str) -> pl.Series:
    """Read a column of frames that were written one after another."""
    # Paths are not patterns. Ids are Int64 in some files if they are too large for the Int32 of the others.
    columns = [pl.scan_ipc(path, glob=False).select(name) for path in files]
    return pl.concat(columns, how="vertical_relaxed").collect()[name]


def read_part(runs: Sequence[pathlib.Path], cuts: np.ndarray, part: int) -> pl.DataFrame:
    """Read all rows of a part: run after run, each in its order; see `cut_runs` for `cuts`."""
    bounds = [(run, int(start), int(end)) for run, (start, end) in zip(runs, cuts[:, part : part + 2], strict=True)]
    filled = [of for of in bounds if of[2] > of[1]] or bounds[:1]
    pieces = pl.collect_all([pl.scan_ipc(run, glob=False).slice(start, end - start) for run, start, end in filled])
    # Gathering rows from one piece is seven times as fast as from a hundred.
    return pl.concat(pieces, how="vertical_relaxed", rechunk=True)


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
