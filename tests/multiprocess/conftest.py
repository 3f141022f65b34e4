"""One uninterrupted run for the tests that kill processes and change their devices."""

from pathlib import Path

import processes
import pytest

#: Two rounds, so that the second's log is that of the first's agents.
ARGS = (*processes.TINY, "--config.log_every=1", "--config.checkpoint_every=4")


@pytest.fixture(scope="session")
def args() -> tuple[str, ...]:
    return ARGS


@pytest.fixture(scope="session")
def reference(launch, once) -> Path:
    """The run folder of the job run from start to end on one device."""
    return once("reference", lambda folder: launch.ok("train", *ARGS, f"--workdir={folder / 'run'}")) / "run"
