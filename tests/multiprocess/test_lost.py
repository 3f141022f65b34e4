"""Hosts that share neither clock, name nor working folder; one of them never comes, or hangs in a step."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import HANG, ROOT, TINY

pytestmark = pytest.mark.slow

#: What a host has alone: Python runs this before anything else.
SITE = """
import socket, time
socket.gethostname = lambda: "host-{index}"
for name in ("time", "time_ns"):
    now, ahead = getattr(time, name), {hours} * 3600 * (10**9 if name == "time_ns" else 1)
    setattr(time, name, lambda now=now, ahead=ahead: now() + ahead)
"""
STEP = "mmrf_jax.abtest.simulate.rollout_user_metrics"  # of an arm


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(launch, folder: Path, port: int, index: int, name: str, *args: str, hangs: bool = False) -> subprocess.Popen:
    """One of two processes, on a separate host; what it says goes to the file `said` in the host's folder."""
    host = folder / f"host{index}"
    host.mkdir(parents=True)
    (host / "sitecustomize.py").write_text(SITE.format(index=index, hours=-30 * index))
    main = ["-m", f"launch.{name}"]
    if hangs:
        main = [str(ROOT / "tests" / "multiprocess" / "stop_at.py"), STEP, "2", f"launch.{name}"]
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
def test_a_host_that_never_comes_is_named(there, launch, tmp_path):
    flags = (*TINY, f"--workdir={tmp_path / 'run'}", "--join_seconds=3")
    process = start(launch, tmp_path, free_port(), there, "train", *flags)
    assert process.wait(HANG) == 1  # not 2: another start may help
    (line,) = errors(tmp_path, there)
    assert re.match(rf"error: process {1 - there} of 2.* did not join within 3 s; start all processes again", line)
    assert not (tmp_path / "run").exists()


def ab_test(launch, folder: Path, out: Path, *more: str, hangs: bool = False) -> list[int]:
    """Run an A/B test on two hosts; return their exit codes."""
    args, port = (*TINY, "--arms=production,random", "--sessions=300", f"--out={out}", *more), free_port()
    processes = [start(launch, folder, port, n, "ab_test", *args, hangs=hangs and n == 1) for n in range(2)]
    return [process.wait(HANG) for process in processes]


def test_a_host_that_hangs_in_a_step_is_named_and_the_next_start_succeeds(launch, tmp_path):
    """Process 1 hangs before it serves the second arm."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    assert ab_test(launch, tmp_path / "1", out, "--stall_seconds=60", hangs=True) == [1, 1]
    for index in range(2):
        (line,) = errors(tmp_path / "1", index)
        where = r"process 1 \(pid \d+ on host-1\) hangs in abtest/simulate.py:\d+ \(simulate_ab_test\)"
        assert re.match(rf"error: {where}: the run has not moved for 60 s; start all processes again", line)
    assert not out.exists()
    assert ab_test(launch, tmp_path / "2", out) == [0, 0]
    launch.ok("ab_test", *TINY, "--arms=production,random", "--sessions=300", f"--out={alone}")
    found = json.loads(out.read_text())
    assert found == json.loads(alone.read_text()) and found["ab_test"]["random"]["watch_time"]["diff_pct"] < -20.0
