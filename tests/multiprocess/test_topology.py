"""A run that starts on one number of devices and ends on another (contract.md, "Tolerances", another topology: c)."""

import os
import signal

import pytest
from processes import phases, results, steps

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

    found, wanted = results(workdir), results(reference)
    for count in ("rounds", "sessions_of_last_round"):
        assert found["train"][count] == wanted["train"][count], count
    for arm, metrics in wanted["ab_test"].items():
        for name, entry in metrics.items():
            here = found["ab_test"][arm][name]
            if arm == "production":  # a fixed policy
                assert here["mean"] == pytest.approx(entry["mean"], rel=1e-5), name
            elif entry["diff_pct"] is not None:
                half = (entry["ci95"][1] - entry["ci95"][0]) / 2
                assert abs(here["diff_pct"] - entry["diff_pct"]) <= half + 1e-9, (arm, name)
