"""A log on disk that is read as it is trained on: the same batches after a kill, and for two processes."""

import os
import shutil
import signal

import pytest
from comparing import assert_close, assert_same
from processes import HANG, ONE_ROUND, results, rows, steps

pytestmark = pytest.mark.slow

SEAL = "mmrf_jax.checkpointing.integrity.seal"  # right after the commit of a checkpoint


def test_a_log_read_as_it_is_trained_on(launch, args, tmp_path):
    launch.ok("collect", *args, "--sessions=300", f"--out={tmp_path / 'log'}")
    args += (*ONE_ROUND, f"--config.data.dir={tmp_path / 'log'}", "--config.data.stream=True")
    whole, one, two = (tmp_path / name for name in ("whole", "one", "two"))
    process = launch.start("train", *args, f"--workdir={whole}", log=tmp_path / "said", stop_at=(SEAL, 1))
    how = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code
    assert how == os.CLD_STOPPED, (tmp_path / "said").read_text()[-3000:]
    for folder in (one, two):
        shutil.copytree(whole, folder)  # what a kill would leave
    process.send_signal(signal.SIGCONT)
    assert process.wait(HANG) == 0, (tmp_path / "said").read_text()[-3000:]
    assert results(whole)["train"]["sessions_of_last_round"] == 300

    assert steps(one) == [4]
    assert "resumed at step 4, round 1\n" in launch.ok("train", *args, f"--workdir={one}").stderr
    assert_same(one, whole)

    launch.ok("train", *args, f"--workdir={two}", processes=2)
    assert_close(two, whole)
    # Two processes read other parts of the log, and see the same batches.
    after = [(here, there) for here, there in zip(rows(two), rows(whole), strict=True) if there["step"] > 4]
    assert {row["phase"] for _, row in after} == {"fit", "train"} and len(after) > 15
    for here, there in after:
        for name in there.keys() & {"loss/click", "loss/continuation", "loss/like"}:
            assert here[name] == pytest.approx(there[name], rel=2e-3), (here["step"], name)
