"""Runs a main, and writes how much memory it uses: a line of metrics rows written and KiB, twice a second.

python in_use.py FILE METRICS launch.train --config=…

glibc keeps what is freed for later, more or less of it as its threads come and go: the resident memory of a process
moves by a tenth while it uses the same. Here it gives back all that is free before each reading.
"""

import ctypes
import os
import runpy
import sys
import threading
import time
from pathlib import Path


def held() -> int:
    """KiB of memory in use, resident or swapped out; not the pages of files, which the system drops as it likes."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:")))


def watch(out: Path, metrics: Path) -> None:
    with out.open("w", buffering=1) as file:
        while True:
            print(metrics.read_bytes().count(b"\n") if metrics.exists() else 0, held(), file=file)
            time.sleep(0.5)


if __name__ == "__main__":
    _, out, metrics, main, *args = sys.argv
    sys.path.insert(0, os.getcwd())
    threading.Thread(target=watch, args=(Path(out), Path(metrics)), daemon=True).start()
    sys.argv = [main, *args]
    runpy.run_module(main, run_name="__main__", alter_sys=True)
