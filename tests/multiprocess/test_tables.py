"""The whole job with small tables of half precision: rows that ids share, rounded at random; learned, and resumed."""

import os
import shutil
import signal

import pytest
from comparing import assert_same
from processes import HANG, ONE_ROUND, results, rows, steps

from mmrf_jax.checkpointing import integrity

pytestmark = pytest.mark.slow

SMALL = ONE_ROUND + tuple(
    f"--config.{room}.{field}" for room in ("agents", "feedback") for field in ("max_rows=100", "table_dtype=bfloat16")
)
SEAL = "mmrf_jax.checkpointing.integrity.seal"  # right after the commit of a checkpoint


def test_small_tables_of_half_precision(launch, args, tmp_path):
    """1,000 videos share 100 rows; a killed run ends with the bits of one that was not."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = launch.start("train", *args, *SMALL, f"--workdir={whole}", log=tmp_path / "log", stop_at=(SEAL, 2))
    how = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code
    assert how == os.CLD_STOPPED, (tmp_path / "log").read_text()[-3000:]
    shutil.copytree(whole, killed)  # what a kill would leave
    process.send_signal(signal.SIGCONT)
    assert process.wait(HANG) == 0, (tmp_path / "log").read_text()[-3000:]
    leaves = integrity.load(whole / "checkpoints" / str(steps(whole)[-1])).leaves
    assert leaves["agents/tables/id/rows"] == ["bfloat16", [100, 8]]
    assert leaves["feedback/tables/id/rows"] == ["bfloat16", [100, 16]]
    assert leaves["feedback/tables/id/accumulator"] == ["float32", [100]]

    done = launch.ok("train", *args, *SMALL, f"--workdir={killed}")
    assert "resumed at step 8, round 1\n" in done.stderr
    assert_same(killed, whole)

    fit = [row["loss/click"] for row in rows(whole) if row["phase"] == "fit"]
    assert sum(fit[-3:]) < 0.9 * sum(fit[:3])
    assert results(whole)["ab_test"]["mmrf"]["watch_time"]["mean"] > 0.0
