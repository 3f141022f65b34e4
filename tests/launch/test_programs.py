"""What a run compiles, as its own log says."""

import collections
import re

import processes
import pytest

#: Programs that take more than a second to compile, and how often they are: sessions are served in the world and in the
#: feedback model.
LARGE = {
    "_draw": 1,
    "unroll": 1,
    "init_train_state": 1,
    "fit_step": 1,
    "_measure": 1,
    "update_step": 1,
    "_serve": 2,
    "evaluate": 1,
}


@pytest.mark.slow
def test_a_run_compiles_large_programs_once_and_few_small_ones(launch, tmp_path, monkeypatch):
    """From an empty folder to its page, over two rounds: at most 12 large programs and 40 in all."""
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    run = launch.start("train", *processes.TINY, f"--workdir={tmp_path / 'run'}", log=tmp_path / "log")
    assert run.wait(processes.HANG) == 0
    log = (tmp_path / "log").read_text()
    compiled = collections.Counter(re.findall(r"Finished XLA compilation of jit\((.+?)\) in", log))
    assert (tmp_path / "run" / "report.html").exists() and "no report" not in log
    assert {name: compiled[name] for name in LARGE} == LARGE
    assert sum(compiled.values()) <= 40, compiled
    assert len(LARGE) < 12
