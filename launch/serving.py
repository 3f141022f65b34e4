"""A ranking service as a process of its own, for mains that ask it: the loop and the benchmark."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PATIENCE = 300.0  # seconds for a service to start, or to move on to an artefact


class Server(NamedTuple):
    """A running service."""

    url: str
    process: subprocess.Popen


@contextlib.contextmanager
def service(artifact: Path, log: Path, output: Path, *flags: str) -> Iterator[Server]:
    """`launch.serve` on a free port of this machine, until the end of the block; it writes its output to a file.

    Raises:
      ValueError: where it does not start.
    """
    given = [f"--artifact={artifact}", f"--log={log}", "--port=0", f"--parent={os.getpid()}", *flags]
    command = [sys.executable, "-m", "launch.serve", *given]
    with output.open("wb") as out:  # in a group of its own: Ctrl-C is for this process, which ends the service
        process = subprocess.Popen(command, stdout=out, stderr=out, process_group=0)
    try:
        yield Server(_address(process, output), process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen, output: Path) -> str:
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        if found := re.search(r"serving artefact \S+ on (http://\S+)", output.read_text()):
            with contextlib.suppress(OSError):
                health(found[1])
                return found[1]
        time.sleep(0.1)
    raise ValueError(f"the service did not start; {output} says why: {output.read_text()[-300:]}")


def health(url: str) -> dict[str, Any]:
    """What /healthz says."""
    with urllib.request.urlopen(f"{url}/healthz", timeout=10) as answer:
        return json.loads(answer.read())
