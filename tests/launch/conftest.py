"""One finished tiny run for the tests of the mains."""

from pathlib import Path

import processes
import pytest


@pytest.fixture(scope="session")
def finished(launch, tmp_path_factory) -> Path:
    """A run folder that nobody may change: copy it first."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    launch.ok("train", *processes.TINY, f"--workdir={workdir}")
    return workdir
