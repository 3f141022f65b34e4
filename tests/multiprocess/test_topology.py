"""A run that starts on one number of devices and ends on another (contract.md, "Tolerances", another topology: c)."""

import os
import signal

import pytest
from comparing import assert_close
from processes import phases, steps

pytestmark = pytest.mark.slow

SEAL = "mmrf_jax.checkpointing.integrity.seal"  # right after the commit of a checkpoint


@pytest.mark.parametrize(("first", "then"), [(4, 1), (1, 4)])
def test_a_run_moves_to_another_number_of_devices(first, then, launch, reference, args, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log.txt"
    process = launch.start("train", *args, f"--workdir={workdir}", devices=first, log=log, stop_at=(SEAL, 1))
    how = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code
    assert how == os.CLD_STOPPED, f"the process ended\n{log.read_text()[-3000:]}"
    assert phases(log)[-1] == "fit" and steps(workdir) == [4]
    assert not (workdir / "learned.json").exists()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = launch.ok("train", *args, f"--workdir={workdir}", devices=then)
    assert "resumed at step 4, round 1\n" in done.stderr

    assert_close(workdir, reference)
