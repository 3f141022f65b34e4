"""`--init_from`: a run begins with what another has learned, and leaves that one unchanged."""

import json
import re
import shutil

import pytest
from processes import TINY, error_line, results


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_runs_that_cannot_be_started_from_are_one_line(launch, finished, tmp_path):
    run = tmp_path / "run"
    done = launch("train", *TINY, "--init_from=nosuch", f"--workdir={run}")
    error_line(done, "nosuch is not a run folder", "config.json")
    half = shutil.copytree(finished, tmp_path / "half")
    (half / "learned.json").unlink()
    error_line(launch("train", *TINY, f"--init_from={half}", f"--workdir={run}"), "half has not finished training")
    assert not run.exists()
    before = snapshot(half)
    done = launch("train", *TINY, f"--init_from={half}", f"--workdir={half}")
    error_line(done, "half is the run folder itself", "use another workdir")
    assert snapshot(half) == before


@pytest.mark.slow
def test_a_run_begins_with_another_one(launch, finished, tmp_path):
    before, run = snapshot(finished), tmp_path / "run"
    args = (*TINY, "--config.alternation.rounds=1", f"--init_from={finished}")
    done = launch.ok("train", *args, f"--workdir={run}")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("init_from")]
    # The world's videos are the same. Of the users none has an embedding, and some authors may have no video.
    assert "none fresh" in line and "agents/id 1,000 of 1,000" in line and "feedback/id 1,000 of 1,000" in line
    copied = int(re.search(r"(\d+) arrays copied", line)[1])
    assert copied > 50
    assert json.loads((run / "config.json").read_text())["init_from"] == str(finished)
    assert results(run)["train"]["rounds"] == 1 and snapshot(finished) == before
    # The feedback model starts where the other one ended: on the same batches its first losses are lower.
    first = {place: json.loads((place / "metrics.jsonl").read_text().splitlines()[0]) for place in (run, finished)}
    assert first[run]["phase"] == first[finished]["phase"] == "fit"
    for name in ("loss/click", "loss/long_view", "loss/continuation"):
        assert first[run][name] < first[finished][name]
