"""Metrics of a run on disk: `metrics.jsonl` always, TensorBoard events optionally."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from mmrf_jax.io import extras
from mmrf_jax.io.files import write_text
from mmrf_jax.io.progress import say

#: Columns of a row that are not metrics.
COLUMNS = ("step", "seed", "phase", "seconds")


class MetricsWriter:
    """Writes per logging step a JSON line `{"step", "seed", "phase", "seconds", metric: value, ...}` and events.

    `seconds` is the wall time since the run first started, including restarts but not the pauses between them. It is
    the only column that differs between two runs of one config. `write` flushes a row to the file before it returns.

    Args:
      workdir: folder of the run, for `metrics.jsonl` and `tensorboard/`. With None metrics are checked but not written,
        as in all but one of several processes.
      start_step: step of the restored checkpoint; later rows are removed, and so is a last line truncated by a kill.
        None means no checkpoint: the run and its metrics start afresh.
      seed: the run's seed, for its column.
      tensorboard: whether to write events too.
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
        tensorboard: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seed, self._clock = seed, clock
        self._started = clock()
        self._file: TextIO | None = None
        self._events: Any = None  # a tensorboardX.SummaryWriter
        if workdir is None:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        last = cut_back(path, start_step)
        self._started -= float(last.get("seconds", 0.0))
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            self._events = _events(workdir / "tensorboard", start_step)

    def write(self, step: int, phase: str, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Write one row and one event per metric.

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
        if clash := sorted(set(values) & set(COLUMNS)):
            raise ValueError(f"metrics {clash} have the names of columns; choose other names than {COLUMNS}")
        if bad := {name: value for name, value in values.items() if not math.isfinite(value)}:
            listed = ", ".join(f"{name} = {value}" for name, value in bad.items())
            raise FloatingPointError(
                f"not finite at step {step} ({phase}): {listed}; lower the learning rate, or look at the last good "
                "checkpoint with JAX_DEBUG_NANS=1"
            )
        seconds = round(self._clock() - self._started, 3)
        row = {"step": int(step), "seed": self._seed, "phase": phase, "seconds": seconds} | values
        if self._file is not None:
            try:
                self._file.write(json.dumps(row, allow_nan=False) + "\n")
                self._file.flush()
            except OSError as error:  # the original error does not name the file
                raise OSError(error.errno, error.strerror, self._file.name) from error
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{phase}/{name}", value, int(step))
        return values

    def close(self) -> None:
        """Flush rows and events to disk and close the files."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _events(folder: Path, start_step: int | None) -> Any:
    """Return a writer of TensorBoard events; None, with a line that says so, if the package is not installed."""
    try:
        with extras.needed("report"):
            from tensorboardX import SummaryWriter
    except extras.MissingExtra as missing:
        _say_once(f"no TensorBoard events: {missing}")
        return None
    purge = 0 if start_step is None else start_step + 1  # TensorBoard hides older events from this step on
    return SummaryWriter(str(folder), purge_step=purge, flush_secs=10)


@functools.cache
def _say_once(text: str) -> None:
    say(text)


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


def cut_back(path: Path, step: int | None) -> dict[str, Any]:
    """Remove the rows of `metrics.jsonl` after a step (all rows for None) and a truncated last line, atomically.

    Returns:
      The last remaining row, {} if there is none.

    Raises:
      ValueError: for a line, not the last, that is not a row.
    """
    if not path.exists():
        return {}
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    rows = []
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
    text = "".join(f"{line}\n" for line, _ in rows)
    if text != "\n".join(lines):
        write_text(path, text)
    return rows[-1][1] if rows else {}
