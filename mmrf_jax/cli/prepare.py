"""Convert logs of any size to session records, ahead of training: KuaiRand's CSV files, or your own tables.

  mmrf prepare --source=$KUAIRAND_DIR --out=records/kuairand
  mmrf train --config=kuairand --config.data.dir=records/kuairand --workdir=runs/kuairand

  mmrf prepare --config=logs --config.data.path='logs/*.parquet' --config.data.schema=schema.py --out=records/shop
  mmrf train --config=logs --config.data.path=records/shop --workdir=runs/shop

Of KuaiRand, fields of `config.data` (candidates, days of the splits …) must be the same in both commands. Re-running
the same command after a stop or kill resumes it. In addition to the records, it needs about half the disk space of the
CSV files temporarily.

Work is done in --workers processes. On several machines Beam does it (pip install 'mmrf_jax[beam]'), over files
that all machines see under the same paths:

  mmrf prepare --source=DIR --out=DIR --engine=beam \\
      --pipeline_option=runner=FlinkRunner --pipeline_option=flink_master=HOST:8081
"""

import contextlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from absl import flags

from mmrf_jax.cli import common
from mmrf_jax.io import extras, files
from mmrf_jax.io.progress import counted

_CONFIG = common.define_config("kuairand")
_SOURCE = common.define_path("source", None, "Folder with KuaiRand's CSV files, or its parent; not for own logs.")
_OUT = common.define_path("out", None, "Folder to write.", required=True)
_ENGINE = flags.DEFINE_enum("engine", "local", ["local", "beam"], "Processes of this machine, or Apache Beam.")
_WORKERS = flags.DEFINE_integer(
    "workers", None, "Processes, 0.7 GiB each; by default one a core, at most two (4 GiB in all).", lower_bound=1
)
_OPTIONS = flags.DEFINE_multi_string("pipeline_option", [], "Of Beam's pipeline, such as runner=FlinkRunner.")


def main() -> None:
    with extras.needed("data"):
        from mmrf_jax.data.readers.engine import tasks

    config = common.resolve_run(_CONFIG)
    prepare = {"kuairand": _kuairand, "logs": _logs}.get(config.source)
    if prepare is None:
        raise ValueError(f"config.source is {config.source!r}; this prepares logs: use --config=kuairand or logs")
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        if _ENGINE.value == "beam":
            engine = tasks.beam_pipelines([f"--{option}" for option in _OPTIONS.value])
        else:
            engine = stack.enter_context(tasks.worker_processes(_WORKERS.value))
        memory = stack.enter_context(_Memory())
        rows, new = prepare(config, engine)
    seconds = time.monotonic() - start
    if _ENGINE.value == "local" and new:
        print(f"{seconds:.1f} s, {rows / seconds:,.0f} rows/s; peak memory {memory.peak / 2**30:.2f} GiB")


def _kuairand(config, engine) -> tuple[int, bool]:
    """Prepare KuaiRand; return the rows of its log, and whether there was something to do."""
    from mmrf_jax.data.readers import kuairand
    from mmrf_jax.training import log_source

    if _SOURCE.value is None:
        raise ValueError("no folder of KuaiRand's CSV files; use --source=DIR")
    files.check_writable(_OUT.value.parent, "--out")
    before = _OUT.value.exists()
    wanted = log_source.kuairand_config(config)
    log = kuairand.prepare_log(_SOURCE.value, _OUT.value, wanted, engine, counted)
    rows = sum(counts["rows"] for counts in log.report["log"].values())
    _say(rows, _OUT.value, log.report["splits"])
    return rows, not before


def _logs(config, engine) -> tuple[int, bool]:
    """Prepare own tables, likewise."""
    from mmrf_jax.data.frame_log import SessionLog
    from mmrf_jax.training import own_logs

    files.check_writable(_OUT.value.parent, "--out")
    before = _OUT.value.exists()
    log = (
        SessionLog.open(_OUT.value)
        if before
        else own_logs.read_own_log(config.own_logs, folder=_OUT.value, engine=engine)
    )
    counts = ("users", "sessions", "requests", "rows")
    splits = {name: {key: of[key] for key in counts} for name, of in log.report["splits"].items()}
    _say(log.report["rows"], _OUT.value, splits)
    return log.report["rows"], not before


def _say(rows: int, where: Path, splits: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"{rows:,} rows -> {where}")
    for name, counts in splits.items():
        print(f"  {name}: " + ", ".join(f"{value:,} {key}" for key, value in counts.items()))


class _Memory:
    """Context that samples the memory of this process and its descendants ten times a second; `peak` is in bytes."""

    def __enter__(self) -> "_Memory":
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        here = psutil.Process()
        while not self._done.wait(0.1):
            total = 0
            for process in (here, *here.children(recursive=True)):
                with contextlib.suppress(psutil.Error):  # it has just ended
                    total += process.memory_info().rss
            self.peak = max(self.peak, total)


def run() -> None:
    """Run this command."""
    common.run(main, resumes=True, devices=False)
