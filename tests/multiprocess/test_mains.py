"""Mains that can be several processes: what the first writes is what one process alone writes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest

from mmrf_jax.cli.benchmarks import scale
from mmrf_jax.data import records

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_logs_of_two_processes(launch, tmp_path):
    for number in (1, 2):
        flags = ("--sessions=100", f"--out={tmp_path / str(number)}")
        launch.ok("collect", *processes.TINY, *flags, processes=number)
    one, two = (records.read_log(tmp_path / str(number))[0] for number in (1, 2))
    for field in dataclasses.fields(one):
        np.testing.assert_allclose(getattr(one, field.name), getattr(two, field.name), rtol=1e-4, atol=1e-5)


def test_steps_of_two_processes_are_timed(launch, args, monkeypatch):
    for name, value in launch.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(scale, "_JOB", (*args, *processes.ONE_ROUND, "--config.collect.sessions=100"))
    found = scale.processes(2, 1)
    assert set(found) == {"step, fit", "step, train"}
    assert all(value > 0.0 and unit == "ms" for value, unit in found.values())


def test_other_mains_are_one_process(tmp_path):
    command = [sys.executable, "-m", "launch.benchmark", f"--out={tmp_path / 'file'}", "--multihost"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=processes.HANG)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "one process" in done.stderr, done.stderr
