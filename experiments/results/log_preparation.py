"""What it costs to prepare a log by the number of its rows: KuaiRand's files, and the same log as your own tables.

  python -m experiments.results.log_preparation
  python -m experiments.results.log_preparation --rows=100000000 --folder=SCRATCH

Each size is synthesized in both layouts (`mmrf synthesize`, half a million rows at a time) and prepared by `mmrf
prepare`. The memory is the most that all processes held together. The three sizes take ten minutes on two cores; 10^8
rows need 30 GB of disk in --folder, too.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

_ROWS = flags.DEFINE_list("rows", ["100000", "1000000", "10000000"], "Rows of the standard log.")
_LAYOUTS = flags.DEFINE_multi_enum("layout", ["kuairand", "tables"], ["kuairand", "tables"], "What to prepare.")
_FOLDER = flags.DEFINE_string("folder", None, "Folder to work in; a temporary one by default.")
_VIDEOS, _ROWS_A_USER = 100_000, 500
_OWN = {"path": "log", "schema": "schema.py", "item_table": "items", "user_table": "users"}


def main(_):
    print("| rows | layout | rows per second | processor µs per row | memory |\n|---|---|---|---|---|")
    for rows in map(int, _ROWS.value):
        for layout in _LAYOUTS.value:
            with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
                print(f"| {rows:,} | {layout} | {' | '.join(measure(rows, layout, Path(folder)))} |", flush=True)


def measure(rows: int, layout: str, folder: Path) -> tuple[str, str, str]:
    """Return rows per second, processor microseconds a row and the memory, in words."""
    log, out = folder / "log", folder / "records"
    sizes = (f"--rows={rows}", f"--users={rows // _ROWS_A_USER}", f"--videos={_VIDEOS}")
    _run("synthesize", *sizes, f"--layout={layout}", f"--out={log}")
    source = [f"--source={log}"]
    if layout == "tables":
        source = ["--config=logs", *(f"--config.data.{key}={log / name}" for key, name in _OWN.items())]
    before = os.times()
    said = _run("prepare", *source, f"--out={out}")
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    shutil.rmtree(out)
    found = re.search(r"([\d,]+) rows/s; peak memory ([\d.]+) GiB", said)
    assert found is not None, said
    return found[1], f"{1e6 * seconds / rows:.1f}", f"{found[2]} GiB"


def _run(*command: str) -> str:
    command = (sys.executable, "-m", "mmrf_jax.cli", *command)
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout


if __name__ == "__main__":
    app.run(main)
