"""A ranking service in a separate process, for the mains that are its clients: the loop and the benchmark."""

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

PATIENCE = 300.0  # seconds for a service to start, or to switch to an artefact


class Server(NamedTuple):
    """A running service."""

    url: str
    process: subprocess.Popen


@contextlib.contextmanager
def service(artifact: Path, log: Path, output: Path, *flags: str) -> Iterator[Server]:
    """Run `mmrf serve` on a free port of this machine until the end of the block; its output goes to a file.

    Raises:
      ValueError: if it does not start.
    """
    given = [f"--artifact={artifact}", f"--log={log}", "--port=0", f"--parent={os.getpid()}", *flags]
    command = [sys.executable, "-m", "mmrf_jax.cli", "serve", *given]
    with output.open("wb") as out:  # separate process group: this process handles Ctrl-C and ends the service
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
    """Return the response of /healthz."""
    with urllib.request.urlopen(f"{url}/healthz", timeout=10) as answer:
        return json.loads(answer.read())
