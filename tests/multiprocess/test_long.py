"""Ten thousand updates: the memory of the process stays flat, and so does the disk that checkpoints take."""

from pathlib import Path

import pytest
from processes import results, rows, steps, wait_until

pytestmark = pytest.mark.slow

UPDATES = 10_000


def resident(pid: int) -> int:
    """KiB that a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def test_memory_and_disk_stay_flat(launch, args, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    longer = ("--config.alternation.rounds=1", "--config.train.batch=8", "--config.log_every=50")
    launch.ok("train", *args, *longer, f"--workdir={tmp_path / 'short'}")
    per_epoch = results(tmp_path / "short")["train"]["updates"]
    epochs = -(-UPDATES // per_epoch)
    longer += (f"--config.train.epochs={epochs}", "--config.checkpoint_every=500")
    process = launch.start("train", *args, *longer, f"--workdir={workdir}", log=log)
    memory: dict[int, int] = {}
    most = 0

    def learned() -> bool:
        nonlocal most
        done = rows(workdir)
        if done and done[-1]["phase"] == "train":
            memory.setdefault(done[-1]["step"] // 500, resident(process.pid))
        most = max(most, len(steps(workdir)))
        return (workdir / "learned.json").exists()

    assert wait_until(process, learned, timeout=900), log.read_text()[-3000:]
    assert process.wait() == 0
    assert results(workdir)["train"]["updates"] >= UPDATES
    assert most <= 4 and len(steps(workdir)) <= 3  # one more while a save is under way
    held = [memory[at] for at in sorted(memory)]
    assert len(held) >= 15, memory
    assert max(held[2:]) < 1.02 * held[2], held  # from the thousandth update on
