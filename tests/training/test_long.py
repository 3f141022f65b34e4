"""Ten thousand updates: the memory of the process stays flat, and so does the disk that checkpoints take."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, TINY, results, rows, steps, wait_until

UPDATES = 10_000


@pytest.mark.nightly
def test_memory_and_disk_stay_flat(launch, tmp_path):
    workdir, log, readings = tmp_path / "run", tmp_path / "log", tmp_path / "in_use"
    job = (
        "--config.alternation.rounds=1",
        "--config.alternation.gap_sessions=0",
        "--config.train.segment=1",
        "--config.train.batch=1",
        "--config.train.epochs=7",
        "--config.log_every=25",
        "--config.checkpoint_every=500",
    )
    script = Path(__file__).with_name("in_use.py")
    main = (script, readings, workdir / "metrics.jsonl", "launch.train", *TINY, *job, f"--workdir={workdir}")
    # One heap for all threads: in each of several, pages stay that hold little, and some other one is used next.
    environment = launch.environment() | {"MALLOC_ARENA_MAX": "1"}
    with log.open("xb") as out:
        process = subprocess.Popen([sys.executable, *main], env=environment, cwd=ROOT, stdout=out, stderr=out)
    most = 0

    def learned() -> bool:
        nonlocal most
        most = max(most, len(steps(workdir)))
        return (workdir / "learned.json").exists()

    assert wait_until(process, learned), log.read_text()[-3000:]
    assert process.wait() == 0
    assert results(workdir)["train"]["updates"] >= UPDATES
    assert most <= 4 and len(steps(workdir)) <= 3  # one more while a save is under way
    train = [row["step"] for row in rows(workdir) if row["phase"] == "train"]
    assert len(train) >= UPDATES // 25
    # Of both halves after the first fifth, the middle: a save needs more for a moment.
    held = [(int(count), int(kib)) for count, kib in map(str.split, readings.read_text().splitlines())]

    def share(first, last):
        return [k for n, k in held if first <= n / len(train) < last]

    early, late = statistics.median(share(0.2, 0.6)), statistics.median(share(0.6, 1.0))
    assert late < 1.02 * early, held[:: max(len(held) // 40, 1)]
