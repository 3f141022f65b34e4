"""Trackers of a run's metrics: TensorBoard, a CSV file, Weights & Biases and MLflow, behind one interface.

`metric_writer.MetricsWriter` writes `metrics.jsonl`, the record of a run, and passes its rows on to the trackers.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mmrf_jax.io import extras
from mmrf_jax.io.files import flat, plain, write_json, write_text
from mmrf_jax.io.progress import say

#: The ids of a run in Weights & Biases and MLflow, and the last steps that they have, in the run folder.
IDS = "trackers.json"
#: Project of Weights & Biases and experiment of MLflow; WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME name others.
PROJECT = "mmrf_jax"

Row = Mapping[str, Any]


class Tracker(Protocol):
    """Receives the rows of a run, in order."""

    def write(self, row: Row, values: Mapping[str, float]) -> None:
        """Log a row of metrics.jsonl; `values` are its finite metrics, without the columns "step", "phase", …"""

    def close(self, status: str) -> None:
        """End the tracked run as "FINISHED", "FAILED" (by an error) or "KILLED" (preempted); resuming reopens it."""


class TensorBoard:
    """Writes events to FOLDER/tensorboard, a scalar `PHASE/NAME` per metric.

    Args:
      folder: the run folder, or its mirror on this machine.
      purge: TensorBoard hides older events from this step on.

    Raises:
      MissingExtra: if the package is not installed.
    """

    def __init__(self, folder: Path, purge: int) -> None:
        with extras.needed("report"):
            from tensorboardX import SummaryWriter
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=purge, flush_secs=10)

    def write(self, row: Row, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(f"{row['phase']}/{name}", value, row["step"])

    def close(self, status: str) -> None:
        self._events.close()


class Csv:
    """Writes FOLDER/metrics.csv: the rows of metrics.jsonl, a column per metric, empty where a row has none.

    Args:
      folder: the run folder, or its mirror on this machine.
      kept: rows of metrics.jsonl up to the restored step.
    """

    def __init__(self, folder: Path, kept: Iterable[Row]) -> None:
        self._path, self._rows, self._columns = folder / "metrics.csv", list(kept), dict[str, None]()
        for row in self._rows:
            self._columns |= dict.fromkeys(row)
        self._rewrite()

    def write(self, row: Row, values: Mapping[str, float]) -> None:
        self._rows.append(row)
        if row.keys() <= self._columns.keys():
            self._file.write(self._lines([row]))
            self._file.flush()
        else:  # new columns: at the first row of a phase
            self._columns |= dict.fromkeys(row)
            self._file.close()
            self._rewrite()

    def close(self, status: str) -> None:
        self._file.close()

    def _rewrite(self) -> None:
        head = dict(zip(self._columns, self._columns, strict=True))
        write_text(self._path, self._lines([head, *self._rows]) if head else "")
        self._file = self._path.open("a", encoding="utf-8")

    def _lines(self, rows: Iterable[Row]) -> str:
        out = io.StringIO()
        csv.DictWriter(out, list(self._columns), restval="", lineterminator="\n").writerows(rows)
        return out.getvalue()


class Service(Protocol):
    """A service that shows runs, such as `Wandb`; `Remote` makes a tracker of it."""

    def open(self, workdir: Path, config: Mapping[str, Any], identity: str | None) -> str:
        """Start a tracked run, or reopen the one with this id; return its id.

        `workdir` is a folder of this machine with the run folder's name.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics of a step."""

    def summarise(self, values: Mapping[str, float]) -> None:
        """Set the results of the run."""

    def close(self, status: str) -> None:
        """End the run; see `Tracker`."""


class Remote:
    """A tracked run of a service, which a resumed run continues, without a second copy of rows computed again.

    Args:
      name: of the service, in messages and in the file of ids.
      service: the service.
      workdir: the run folder.
      folder: the run folder, or its mirror on this machine.
      config: of the run, as nested dictionaries.
      kept: rows of metrics.jsonl up to the restored step; a service that is new to the run receives them.
      dropped: rows after that step, which the service has already.

    Raises:
      ValueError: if the service cannot be opened.
    """

    def __init__(
        self,
        name: str,
        service: Service,
        workdir: Path,
        folder: Path,
        config: Mapping[str, Any],
        kept: Sequence[Row],
        dropped: Sequence[Row],
    ) -> None:
        self.summarise, self.close, self._service = service.summarise, service.close, service
        path = workdir / IDS
        known = json.loads(path.read_text()) if path.exists() else {}
        before = known.get(name, {"id": None, "last": {}})
        try:
            identity = service.open(folder, config, before["id"])
        except Exception as error:  # of any library
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"config.trackers: {name} cannot be opened ({why}); set it up or leave it out") from error
        self._last: dict[str, int] = before["last"]  # by phase
        if before["id"]:
            for row in (*kept, *dropped):
                self._last[row["phase"]] = max(row["step"], self._last.get(row["phase"], row["step"]))
        write_json(path, known | {name: {"id": identity, "last": self._last}})
        if not before["id"]:
            for row in kept:
                self.write(row, {name: x for name, x in row.items() if name not in COLUMNS})

    def write(self, row: Row, values: Mapping[str, float]) -> None:
        if row["step"] > self._last.get(row["phase"], -1):
            self._service.log(row["step"], {f"{row['phase']}/{name}": value for name, value in values.items()})


class Wandb:
    """Logs to Weights & Biases; WANDB_MODE=offline and its other variables hold."""

    def open(self, workdir: Path, config: Mapping[str, Any], identity: str | None) -> str:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=workdir.resolve().name,
            id=identity,
            resume="allow",
            dir=str(workdir),
            config=plain(dict(config)),
        )
        return self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def summarise(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def close(self, status: str) -> None:
        self._run.finish(exit_code=int(status != "FINISHED"))


class Mlflow:
    """Logs to MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME hold."""

    def open(self, workdir: Path, config: Mapping[str, Any], identity: str | None) -> str:
        import mlflow

        self._client = mlflow.MlflowClient()
        if identity:
            self._id = identity
            self._client.update_run(identity, status="RUNNING")
            return identity
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        self._id = self._client.create_run(number, run_name=workdir.resolve().name).info.run_id
        for name, value in flat(config).items():
            self._client.log_param(self._id, name, value)
        return self._id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in values.items()])

    def summarise(self, values: Mapping[str, float]) -> None:
        self.log(0, values)

    def close(self, status: str) -> None:
        self._client.set_terminated(self._id, status)


SERVICES: dict[str, Callable[[], Service]] = {"wandb": Wandb, "mlflow": Mlflow}
NAMES = ("tensorboard", "csv", *SERVICES)
#: Those that track one run of a process at a time.
ONE_AT_A_TIME = ("wandb",)
#: Columns of a row that are not metrics.
COLUMNS = ("step", "seed", "phase", "seconds")


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers whose package is missing, before any work is done.

    Raises:
      ValueError: naming the extra that installs it.
    """
    for name in names:
        if name in SERVICES and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"config.trackers has {name!r}, which is not installed; pip install 'mmrf_jax[{name}]', or leave it out"
            )


def open_all(
    names: Iterable[str],
    workdir: Path,
    folder: Path,
    config: Mapping[str, Any],
    kept: Sequence[Row],
    dropped: Sequence[Row],
    start_step: int | None,
) -> dict[str, Tracker]:
    """Open the trackers of a run by name; see `Remote` for the arguments."""
    made: dict[str, Tracker] = {}
    for name in names:
        if name == "tensorboard":
            try:
                made[name] = TensorBoard(folder, 0 if start_step is None else start_step + 1)
            except extras.MissingExtra as missing:  # it is on by default, so it is not asked for
                _say_once(f"no TensorBoard events: {missing}")
        elif name == "csv":
            made[name] = Csv(folder, kept)
        else:
            made[name] = Remote(name, SERVICES[name](), workdir, folder, config, kept, dropped)
    return made


@functools.cache
def _say_once(text: str) -> None:
    say(text)
