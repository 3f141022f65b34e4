"""Convert KuaiRand's CSV files of any size to session records, ahead of training.

  mmrf prepare --source=$KUAIRAND_DIR --out=records/kuairand
  mmrf train --config=kuairand --config.data.dir=records/kuairand --workdir=runs/kuairand

Fields of `config.data` (candidates, days of the splits …) must be the same in both commands. Re-running the same
command after a stop or kill resumes it. In addition to the records, it needs about half the disk space of the CSV files
temporarily.

Work is done in --workers processes. On several machines Beam does it (pip install 'mmrf_jax[beam]'), over files
that all machines see under the same paths:

  mmrf prepare --source=DIR --out=DIR --engine=beam \\
      --pipeline_option=runner=FlinkRunner --pipeline_option=flink_master=HOST:8081
"""

import contextlib
import threading
import time

import psutil
from absl import flags

from mmrf_jax.cli import common
from mmrf_jax.io import copies, extras, files
from mmrf_jax.io.progress import counted

_CONFIG = common.define_config("kuairand")
_SOURCE = common.define_path("source", None, "Folder with KuaiRand's CSV files, or its parent.", required=True)
_OUT = common.define_path("out", None, "Folder to write; what it holds of other configs is kept.", required=True)
_ENGINE = flags.DEFINE_enum("engine", "local", ["local", "beam"], "Processes of this machine, or Apache Beam.")
_WORKERS = flags.DEFINE_integer(
    "workers", None, "Processes, 0.7 GiB each; by default one a core, at most two (4 GiB in all).", lower_bound=1
)
_OPTIONS = flags.DEFINE_multi_string("pipeline_option", [], "Of Beam's pipeline, such as runner=FlinkRunner.")


def main() -> None:
    with extras.needed("data"):
        import tensorflow_datasets as tfds

    from mmrf_jax.data.readers import kuairand
    from mmrf_jax.training import sources

    wanted = sources.kuairand_config(common.resolve_run(_CONFIG))
    start = time.monotonic()
    files.check_writable(_OUT.value, "--out")
    tfds.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        if _ENGINE.value == "beam":
            engine = kuairand.pipelines([f"--{option}" for option in _OPTIONS.value])
        else:
            engine = stack.enter_context(kuairand.processes(_WORKERS.value))
        memory = stack.enter_context(_Memory())
        here = stack.enter_context(copies.built(_OUT.value, f"{kuairand.KuaiRand.name}/{wanted.fingerprint()}"))
        made = kuairand.KuaiRand(
            data_dir=here,
            source=_SOURCE.value,
            config=wanted,
            engine=engine,
            progress=counted,
        )
        before = made.data_path.exists()
        made.download_and_prepare()
    seconds = time.monotonic() - start
    report = kuairand.read_report(made)
    rows = sum(log["rows"] for log in report["log"].values())
    print(f"{rows:,} rows -> {_OUT.value / made.data_path.relative_to(made.data_dir_root)}")
    for name, counts in report["splits"].items():
        print(f"  {name}: " + ", ".join(f"{value:,} {key}" for key, value in counts.items()))
    if _ENGINE.value == "local" and not before:
        print(f"{seconds:.1f} s, {rows / seconds:,.0f} rows/s; peak memory {memory.peak / 2**30:.2f} GiB")


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
