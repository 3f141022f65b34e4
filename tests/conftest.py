"""Defaults of the environment, set before JAX is imported. Tests of several devices start a process (`run_python`)."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")  # virtual CPU devices deadlock on few cores without it

import processes
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run_python():
    """Runs a Python script, given as text, in a process with a number of virtual CPU devices; gives its stdout."""

    def run(script: str, *args: object, devices: int = 1, timeout: float = 240, expect: int = 0) -> str:
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "NPROC": "16"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        command = [sys.executable, "-c", script, *map(str, args)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
        assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def launch(tmp_path_factory) -> processes.Launcher:
    """Starts the mains, all with one compile cache."""
    cache = tmp_path_factory.getbasetemp() / "xla_of_mains"
    cache.mkdir(exist_ok=True)
    return processes.Launcher(cache)
