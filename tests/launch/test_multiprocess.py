"""Several processes on one machine: their output, their exit codes, and signals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import HANG

ROOT = Path(__file__).resolve().parents[2]
NUMBER = "import sys, time; n = int(sys.argv[-1].split('=')[1])\n"  # of the process, from its last flag


def local(script: str, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.multiprocess", *flags, "--", "-c", script]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_each_process_knows_its_place_and_is_heard():
    script = "import os, sys; print(*sys.argv[1:], os.environ['JAX_NUM_CPU_DEVICES'], os.environ['NPROC'])"
    process = local(script, "--num_processes=2", "--devices_per_process=3")
    out, error = process.communicate(timeout=HANG)
    assert process.returncode == 0, error
    lines = sorted(out.splitlines())
    assert [line.split()[0] for line in lines] == ["[0]", "[1]"]
    for n, line in enumerate(lines):
        address, number, place, devices, believed = line.split()[1:]
        assert address == lines[0].split()[1] and address.startswith("--coordinator_address=127.0.0.1:")
        assert (number, place, devices) == ("--num_processes=2", f"--process_id={n}", "3")
        assert int(believed) >= 6


@pytest.mark.parametrize(("code", "said"), [("sys.exit(75)", 75), ("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137)])
def test_the_first_failure_ends_all(code, said):
    script = "import os\n" + NUMBER + f"if n == 1:\n    {code}\ntime.sleep({10 * HANG})"
    process = local(script, "--num_processes=3", "--grace_seconds=0.5")
    process.communicate(timeout=HANG)  # the others would sleep for longer
    assert process.returncode == said


def test_others_may_end_by_themselves():
    script = NUMBER + "if n == 1:\n    sys.exit(1)\ntime.sleep(1.0)\nprint('saved')"
    process = local(script, "--num_processes=2", f"--grace_seconds={HANG}")
    out, _ = process.communicate(timeout=HANG)
    assert process.returncode == 1 and out == "[0] saved\n"


def test_a_signal_is_passed_on():
    handler = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))"
    script = "import signal\n" + NUMBER + f"{handler}\nprint('here', flush=True)\ntime.sleep({10 * HANG})"
    process = local(script, "--num_processes=2")
    assert process.stdout is not None
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] here\n", "[1] here\n"]
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=HANG)
    assert process.returncode == 75


def test_a_command_is_needed():
    done = subprocess.run(
        [sys.executable, "-m", "launch.multiprocess"], cwd=ROOT, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode != 0 and "no command" in done.stdout + done.stderr
