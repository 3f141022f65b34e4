"""Hosts that share neither clock, name nor working folder; one of them never comes, or hangs in a step."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from comparing import assert_same
from processes import HANG, ROOT, steps

pytestmark = pytest.mark.slow

#: What a host has of its own: Python runs this before anything else.
SITE = """
import socket, time
socket.gethostname = lambda: "host-{index}"
for name in ("time", "time_ns"):
    now, ahead = getattr(time, name), {hours} * 3600 * (10**9 if name == "time_ns" else 1)
    setattr(time, name, lambda now=now, ahead=ahead: now() + ahead)
"""
UPDATE = "mmrf_jax.training.steps.update_step"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(launch, folder: Path, port: int, index: int, *args: str, hangs: bool = False) -> subprocess.Popen:
    """One of two processes, on a host of its own; what it says goes to the file `said` in the host's folder."""
    host = folder / f"host{index}"
    host.mkdir(parents=True)
    (host / "sitecustomize.py").write_text(SITE.format(index=index, hours=-30 * index))
    main = ["-m", "launch.train"]
    if hangs:
        main = [str(ROOT / "tests" / "multiprocess" / "stop_at.py"), UPDATE, "2", "launch.train"]
    shape = (f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", f"--process_id={index}")
    args = tuple(arg.replace("--config=experiments", f"--config={ROOT}/experiments") for arg in args)
    env = launch.environment() | {"PYTHONPATH": f"{host}{os.pathsep}{ROOT}", "HANG": "1", "NPROC": "16"}
    with (host / "said").open("xb") as out:
        return subprocess.Popen([sys.executable, *main, *args, *shape], env=env, cwd=host, stdout=out, stderr=out)


def errors(folder: Path, index: int) -> list[str]:
    said = (folder / f"host{index}" / "said").read_text()
    assert "Traceback" not in said and "stack trace" not in said, said[-3000:]
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("there", [0, 1])
def test_a_host_that_never_comes_is_named(there, launch, args, tmp_path):
    process = start(launch, tmp_path, free_port(), there, *args, f"--workdir={tmp_path / 'run'}", "--join_seconds=3")
    assert process.wait(HANG) == 1  # not 2: another start may help
    (line,) = errors(tmp_path, there)
    assert re.match(rf"error: process {1 - there} of 2.* did not come within 3 s; start all processes again", line)
    assert not (tmp_path / "run").exists()


def test_a_host_that_hangs_in_a_step_is_named_and_the_next_start_resumes(launch, args, pair, tmp_path):
    port, workdir = free_port(), tmp_path / "run"
    limited = (*args, f"--workdir={workdir}", "--stall_seconds=60")
    first = [start(launch, tmp_path / "1", port, n, *limited, hangs=n == 1) for n in range(2)]
    assert [process.wait(HANG) for process in first] == [1, 1]
    for index in range(2):
        (line,) = errors(tmp_path / "1", index)
        where = r"process 1 \(pid \d+ on host-1\) hangs in training/train.py:\d+ \(_update\)"
        assert re.match(rf"error: {where}: the run has not moved for 60 s; start all processes again", line)
    saved = steps(workdir)[-1]
    again = [start(launch, tmp_path / "2", port, n, *args, f"--workdir={workdir}") for n in range(2)]
    assert [process.wait(HANG) for process in again] == [0, 0]
    assert f"resumed at step {saved}, " in (tmp_path / "2" / "host0" / "said").read_text()
    assert_same(workdir, pair)
