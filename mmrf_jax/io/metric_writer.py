"""Metrics of a run on disk: `metrics.jsonl` always, TensorBoard events beside it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX import SummaryWriter

from mmrf_jax.io.files import write_text

#: Columns of a row that are no metrics.
COLUMNS = ("step", "seed", "phase", "seconds")


class MetricsWriter:
    """One JSON line for each logging step, `{"step", "seed", "phase", "seconds", metric: value, ...}`, and TensorBoard.

    `seconds` is the wall time since the run first started, restarts included but not the pauses between; it is the only
    column that differs between two runs of one config. A row is on its way to the disk when `write` returns.

    Args:
      workdir: folder of the run; gets `metrics.jsonl` and `tensorboard/`. None: metrics are checked and not written, as
        by all but one of several processes.
      start_step: the step of the restored checkpoint: rows after it are cut off, and so is a last line that a kill
        has torn. None: no checkpoint, the run starts afresh, and so do its metrics.
      seed: the run's seed, for its column.
      tensorboard: whether to write events too.
      clock: seconds, monotonic.

    Raises:
      ValueError: for a line of an existing `metrics.jsonl`, not the last, that is no row.
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
        self._events: SummaryWriter | None = None
        if workdir is None:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        last = cut_back(path, start_step)
        self._started -= float(last.get("seconds", 0.0))
        self._file = path.open("a", encoding="utf-8")
        events = str(workdir / "tensorboard")
        purge = 0 if start_step is None else start_step + 1  # older events from here on are hidden by TensorBoard
        if tensorboard:
            self._events = SummaryWriter(events, purge_step=purge, flush_secs=10)

    def write(self, step: int, phase: str, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Writes one row and one event for each metric.

        Args:
          step: number of the step.
          phase: what the run is at, such as "train" or "collect".
          metrics: numbers and 0-d arrays, possibly in nested dicts (spelled `loss/click` in the row).

        Returns:
          The metrics as written.

        Raises:
          FloatingPointError: for values that are not finite, naming them all and the step; the row is not written.
          ValueError: for a metric that is no scalar or has the name of a column.
          OSError: where the row cannot be written, naming the file.
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
            except OSError as error:  # which does not know its file
                raise OSError(error.errno, error.strerror, self._file.name) from error
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{phase}/{name}", value, int(step))
        return values

    def close(self) -> None:
        """Puts rows and events on the disk."""
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


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested dicts of scalars as one dict, `{"loss": {"click": x}}` as `{"loss/click": float(x)}`.

    Raises:
      ValueError: for a value that is no scalar.
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
    """Drops the rows of `metrics.jsonl` after a step (all rows for None) and a torn last line, atomically.

    Returns:
      The last row that stays, {} if there is none.

    Raises:
      ValueError: for a line, not the last, that is no row.
    """
    if not path.exists():
        return {}
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line feed is torn, or empty
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
