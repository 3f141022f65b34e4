"""Metrics of a run: `metrics.jsonl` always, and the trackers that the config names."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmrf_jax.io import appending, copies, storage, trackers
from mmrf_jax.io.progress import say


class MetricsWriter:
    """Writes per logging step a JSON line `{"step", "seed", "phase", "seconds", metric: value, ...}` and to trackers.

    `seconds` is the wall time since the run first started, including restarts but not the pauses between them. It is
    the only column that differs between two runs of one config. `write` flushes a row to the file before it returns, in
    object storage within seconds (`appending.Appender`); `sync` waits for it.
    A tracker that fails, such as a service that is down, gets no more rows; a line says so, and the run goes on.

    Args:
      workdir: folder of the run, for `metrics.jsonl`. With None metrics are checked but not written, as in all but one
        of several processes.
      start_step: step of the restored checkpoint; later rows are removed, and so is a last line truncated by a kill.
        None means no checkpoint: the run and its metrics start afresh.
      seed: the run's seed, for its column.
      track: names of the trackers, among `trackers.NAMES`.
      config: of the run, as nested dictionaries, for trackers that show it.
      clock: returns monotonic seconds.

    Raises:
      ValueError: for a line of an existing `metrics.jsonl`, not the last, that is not a row.
    """

    def __init__(
        self,
        workdir: str | os.PathLike | None,
        start_step: int | None = None,
        *,
        seed: int = 0,
        track: Iterable[str] = ("tensorboard", "csv"),
        config: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seed, self._clock = seed, clock
        self._started = clock()
        self._file: appending.Appender | None = None
        self._trackers: dict[str, trackers.Tracker] = {}
        if workdir is None:
            return
        workdir = storage.path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        kept, dropped = cut_back(path, start_step)
        self._started -= float(kept[-1].get("seconds", 0.0)) if kept else 0.0
        self._file = appending.Appender(path)
        if start_step is None:
            (workdir / trackers.IDS).unlink(missing_ok=True)
        self._mirror = copies.Mirror(workdir)  # for what libraries append to
        self._trackers = trackers.open_all(track, workdir, self._mirror.folder, config or {}, kept, dropped, start_step)

    def write(self, step: int, phase: str, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Write one row, to the file and to every tracker.

        Args:
          step: number of the step.
          phase: phase of the run, such as "train" or "collect".
          metrics: numbers and 0-d arrays, possibly in nested dicts (named `loss/click` in the row).

        Returns:
          The metrics as written.

        Raises:
          FloatingPointError: for values that are not finite, naming them all and the step; the row is not written.
          ValueError: for a metric that is not a scalar or has the name of a column.
          OSError: if the row cannot be written, naming the file.
        """
        values = flatten(metrics)
        if clash := sorted(set(values) & set(trackers.COLUMNS)):
            raise ValueError(f"metrics {clash} have the names of columns; choose other names than {trackers.COLUMNS}")
        if bad := {name: value for name, value in values.items() if not math.isfinite(value)}:
            listed = ", ".join(f"{name} = {value}" for name, value in bad.items())
            raise FloatingPointError(
                f"not finite at step {step} ({phase}): {listed}; lower the learning rate, or look at the last good "
                "checkpoint with JAX_DEBUG_NANS=1"
            )
        seconds = round(self._clock() - self._started, 3)
        row = {"step": int(step), "seed": self._seed, "phase": phase, "seconds": seconds} | values
        if self._file is not None:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._each(lambda tracker: tracker.write(row, values))
        return values

    def summarise(self, values: Mapping[str, float]) -> None:
        """Pass the results of the run to the services that track it."""
        self._each(lambda tracker: tracker.summarise(values) if isinstance(tracker, trackers.Remote) else None)

    def _each(self, do: Callable[[trackers.Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                do(tracker)
            except Exception as error:  # of any library: the training must not end for it
                del self._trackers[name]
                say(f"{name} gets no more metrics ({type(error).__name__}: {error}); metrics.jsonl has them all")

    def sync(self) -> None:
        """Wait until all rows survive this process."""
        if self._file is not None:
            self._file.sync()

    def close(self, status: str = "FINISHED") -> None:
        """Flush rows to disk, close the file and end the trackers.

        Args:
          status: "FINISHED", "FAILED" or "KILLED", for services that show it.
        """
        if self._file is not None:
            self._file.close()
        self._each(lambda tracker: tracker.close(status))
        if self._file is not None:
            self._mirror.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten nested dicts of scalars, `{"loss": {"click": x}}` to `{"loss/click": float(x)}`.

    Raises:
      ValueError: for a value that is not a scalar.
    """
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}/")
            continue
        array = np.asarray(value)
        if array.shape != ():
            raise ValueError(f"metric {name} has shape {array.shape}; log a scalar, such as its mean")
        flat[name] = int(array) if array.dtype.kind in "iu" else float(array)
    return flat


def cut_back(path: Path, step: int | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Remove the rows of `metrics.jsonl` after a step (all rows for None) and a truncated last line, atomically.

    Returns:
      The remaining rows and the removed ones.

    Raises:
      ValueError: for a line, not the last, that is not a row.
    """
    if not path.exists():
        return [], []
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    rows: list[tuple[str, dict[str, Any]]] = []
    dropped: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line feed is truncated, or empty
        try:
            row = json.loads(line)
            keep = step is not None and row["step"] <= step
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) - 1:
                break
            raise ValueError(
                f"{path}, line {number} is no row of metrics: {line[:60]!r}; repair or remove it"
            ) from error
        if keep:
            rows.append((line, row))
        else:
            dropped.append(row)
    text = "".join(f"{line}\n" for line, _ in rows)
    if text != "\n".join(lines):
        appending.rewrite(path, text)
    return [row for _, row in rows], dropped
