"""Ten thousand updates: the memory of the process stays flat, and so does the disk that checkpoints take."""

from pathlib import Path

import pytest
from processes import TINY, results, rows, steps, wait_until

pytestmark = pytest.mark.slow

UPDATES = 10_000


def held_by(pid: int) -> int:
    """KiB of memory that a process holds for itself, in memory or swapped out; not the pages of files, which the system
    drops and reads as it likes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:")))


def test_memory_and_disk_stay_flat(launch, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    job = (
        "--config.alternation.rounds=1", "--config.alternation.gap_sessions=0", "--config.train.segment=1",
        "--config.train.batch=1", "--config.train.epochs=7", "--config.log_every=25", "--config.checkpoint_every=500",
    )  # fmt: skip
    process = launch.start("train", *TINY, *job, f"--workdir={workdir}", log=log)
    least: dict[int, int] = {}  # KiB, by bytes of metrics: at least so much while so many rows were written
    most, metrics = 0, workdir / "metrics.jsonl"

    def learned() -> bool:
        nonlocal most
        most = max(most, len(steps(workdir)))
        written = metrics.stat().st_size if metrics.exists() else 0
        least[written] = min(least.get(written, 2**40), held_by(process.pid))
        return (workdir / "learned.json").exists()

    assert wait_until(process, learned, timeout=900), log.read_text()[-3000:]
    assert process.wait() == 0
    assert results(workdir)["train"]["updates"] >= UPDATES
    assert most <= 4 and len(steps(workdir)) <= 3  # one more while a save is under way
    train = [row["step"] for row in rows(workdir) if row["phase"] == "train"]
    assert len(train) >= UPDATES // 25
    # It comes and goes in waves of 40 MiB, whose peaks say little; what is lost for good lifts their troughs, too.
    held = [least[written] for written in sorted(least)][:-1]
    early, late = (min(held[len(held) * i // 10 : len(held) * (i + 4) // 10]) for i in (2, 6))
    assert late < 1.02 * early, held[:: max(len(held) // 40, 1)]
