"""Run a command as several processes on this machine, as a cluster would.

  mmrf multiprocess --num_processes=2 --devices_per_process=2 -- \\
      -m mmrf_jax.cli train --config=world --workdir=runs/two

Every output line starts with its process number. SIGTERM and SIGINT are passed on to all processes; a second signal
kills them. If one process fails, the others are stopped, and its exit code is returned: 75 if the run was stopped
after saving its state, so that the same command resumes. If the output's reader is gone, all get SIGTERM.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from absl import app, flags

from mmrf_jax.cli import endings, parsing
from mmrf_jax.parallel.ending import end_by

_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 2, "Processes.", lower_bound=1)
_DEVICES = flags.DEFINE_integer("devices_per_process", 1, "Virtual CPU devices of each.", lower_bound=1)
_GRACE = flags.DEFINE_float(
    "grace_seconds", 15.0, "That the others have to end by themselves once one has failed.", lower_bound=0.0
)


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        parsing.fail("no command; use -- -m mmrf_jax.cli train --config=… --workdir=…")
    processes = start(argv[1:], _NUM_PROCESSES.value, _DEVICES.value)

    asked = unread = False
    speaking = threading.Lock()

    def tell(number: int) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    def pass_on(number: int, _: object) -> None:
        nonlocal asked
        tell(signal.SIGKILL if asked else number)
        asked = True

    def echo(number: int, process: subprocess.Popen) -> None:
        nonlocal unread
        assert process.stdout is not None
        for line in process.stdout:
            with speaking:
                if unread:
                    continue
                try:
                    print(f"[{number}] {line}", end="", flush=True)
                except BrokenPipeError:
                    unread = True
                    tell(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    readers = [threading.Thread(target=echo, args=(n, process)) for n, process in enumerate(processes)]
    for reader in readers:
        reader.start()
    code = wait(processes, _GRACE.value)
    for reader in readers:
        reader.join()
    if unread:
        end_by(signal.SIGPIPE)
    sys.exit(code)


def start(command: list[str], num_processes: int, devices: int) -> list[subprocess.Popen]:
    """Start `python COMMAND` as the processes of one run; the caller reads their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # NPROC: virtual CPU devices deadlock on few cores unless XLA assumes more of them.
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
    env.setdefault("NPROC", str(max(16, 2 * devices)))

    def flags_of(n):
        return [
            f"--coordinator_address={address}",
            f"--num_processes={num_processes}",
            f"--process_id={n}",
        ]

    def begin(n):
        return subprocess.Popen(
            [sys.executable, *command, *flags_of(n)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,  # Ctrl-C is passed on, so that each process gets it once
        )

    return [begin(n) for n in range(num_processes)]


def wait(processes: list[subprocess.Popen], grace: float) -> int:
    """Wait for all processes; return the first nonzero exit code. After a failure the others have `grace` seconds."""
    failed, since = 0, 0.0
    while None in (codes := [process.poll() for process in processes]):
        if not failed and any(codes):
            failed, since = next(code for code in codes if code), time.monotonic()
        if failed and time.monotonic() - since > grace:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    failed = failed or next((process.returncode for process in processes if process.returncode), 0)
    return failed if failed >= 0 else 128 - failed  # killed by a signal: the exit code that shells give


def run() -> None:
    """Run this command."""
    parsing.explain(__name__)
    with endings.of_closed_pipes():
        app.run(main, flags_parser=functools.partial(parsing.parse, positional=True))
