"""Several processes as one run: the same numbers, asked to stop, and one of them killed."""

import functools
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from comparing import assert_close, assert_same
from processes import phases, rows, steps, wait_until

pytestmark = pytest.mark.slow


def child(process: subprocess.Popen, number: int) -> int:
    """The process id of a process of a run that launch.multiprocess has started."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (folder / "stat").exists():
            try:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == process.pid and f"--process_id={number}" in (folder / "cmdline").read_text().split("\0"):
                    return int(folder.name)
            except (FileNotFoundError, ProcessLookupError):
                continue
    raise AssertionError(f"no process {number}")


@pytest.fixture(scope="session")
def pair(launch, args, once) -> Path:
    """The run folder of the job run by two processes from start to end, and in a file next to it what they said."""

    def run(folder: Path) -> None:
        done = launch.ok("train", *args, f"--workdir={folder / 'run'}", processes=2)
        (folder / "said").write_text(done.stdout)

    return once("pair", run) / "run"


def test_two_processes(pair, reference):
    assert_close(pair, reference)
    said = (pair.parent / "said").read_text().splitlines()
    assert {line for line in said if line.startswith("[0] phase: ")} and not [
        x for x in said if x.startswith("[1] phase")
    ]
    assert [line for line in said if line.startswith("[0] | mmrf ")] and not [x for x in said if x.startswith("[1] |")]
    assert sorted(path.name for path in pair.iterdir()) == sorted(path.name for path in reference.iterdir())


@pytest.mark.nightly
def test_two_processes_of_two_devices(launch, args, reference, tmp_path):
    launch.ok("train", *args, f"--workdir={tmp_path / 'run'}", processes=2, devices=2)
    assert_close(tmp_path / "run", reference)


def stopped(
    launch, args, workdir: Path, log: Path, phase: str, processes: int, number: int = 0, by: int = signal.SIGTERM
) -> int:
    """Starts a run, sends a signal to one of its processes in a phase, and gives the exit code."""
    process = launch.start("train", *args, f"--workdir={workdir}", log=log, processes=processes)
    assert wait_until(process, lambda: phases(log)[-1:] == [phase]), log.read_text()[-3000:]
    os.kill(child(process, number) if processes > 1 else process.pid, by)
    return process.wait()


#: Where each start is asked to stop; each resumes from what the one before has saved.
PHASES = ("collect", "fit", "train", "model_exploitation_gap", "ab_test", "offline", "report")


@pytest.mark.parametrize(
    ("processes", "stopped_in"),
    [
        pytest.param(1, PHASES[::2], id="1"),
        pytest.param(2, PHASES[1::4], id="2"),
        pytest.param(1, PHASES, marks=pytest.mark.nightly, id="1 in all"),
        pytest.param(2, PHASES, marks=pytest.mark.nightly, id="2 in all"),
    ],
)
def test_told_to_stop_in_every_phase(processes, stopped_in, launch, args, reference, pair, tmp_path):
    workdir = tmp_path / "run"
    for number, phase in enumerate(stopped_in):
        log = tmp_path / f"{number}.log"
        before = max(steps(workdir), default=0)
        # The report is the first process's alone; the signals take turns over all.
        asked = 0 if phase == "report" else number % processes
        by = (signal.SIGTERM, signal.SIGINT)[number // 2 % 2]
        code = stopped(launch, args, workdir, log, phase, processes, asked, by)
        assert code == 75, f"{phase}\n{log.read_text()[-3000:]}"
        assert (workdir / "results.json").exists() == (phase == "report") and not (workdir / "report.html").exists()
        saved = re.search(r"saved step (\d+)", log.read_text())
        if phase in ("fit", "train", "model_exploitation_gap"):
            assert saved, log.read_text()[-3000:]
            assert steps(workdir)[-1] == int(saved[1]) >= before
        assert re.search("asked to stop by SIG(TERM|INT); the same command resumes", log.read_text())
    launch.ok("train", *args, f"--workdir={workdir}", processes=processes)
    assert (workdir / "report.html").exists()
    assert_same(workdir, reference if processes == 1 else pair)


@pytest.fixture(scope="session")
def stopped_in_fit(launch, args, once) -> tuple[Path, int]:
    """A run of 2 x 2 devices, stopped in its first fit, and the step that it saved."""

    def run(folder: Path) -> None:
        log, at = folder / "log", f"--workdir={folder / 'run'}"
        process = launch.start("train", *args, at, log=log, processes=2, devices=2)
        assert wait_until(process, lambda: phases(log)[-1:] == ["fit"]), log.read_text()[-3000:]
        os.kill(child(process, 1), signal.SIGTERM)
        assert process.wait() == 75, log.read_text()[-3000:]

    folder = once("stopped", run)
    return folder / "run", int(re.findall(r"saved step (\d+)", (folder / "log").read_text())[-1])


@pytest.mark.parametrize(
    ("processes", "devices"),
    [
        (1, 1),
        pytest.param(1, 4, marks=pytest.mark.nightly),
        pytest.param(4, 1, marks=pytest.mark.nightly),
    ],
)
def test_a_stopped_run_goes_on_elsewhere(processes, devices, launch, args, stopped_in_fit, reference, tmp_path):
    before, step = stopped_in_fit
    workdir = tmp_path / "run"
    shutil.copytree(before, workdir)
    done = launch.ok("train", *args, f"--workdir={workdir}", processes=processes, devices=devices)
    assert f"resumed at step {step}, round 1" in done.stderr + done.stdout
    assert_close(workdir, reference)
    # The first round's log is production's, so the rest of its fit sees the same batches as one device does.
    fitted = [[row for row in rows(folder) if row["phase"] == "fit"] for folder in (workdir, reference)]
    rest = [(here, there) for here, there in zip(*fitted, strict=True) if step < here["step"] < rounds_end(reference)]
    assert len(rest) > 2
    for here, there in rest:
        for name in ("loss/click", "loss/watch_time", "loss/continuation"):
            assert here[name] == pytest.approx(there[name], rel=1e-3), (here["step"], name)


def rounds_end(workdir: Path) -> int:
    """The step at which the first round ended."""
    return next(row["step"] for row in rows(workdir) if row["phase"] == "model_exploitation_gap")


def saved_in(phase: str, workdir: Path, log: Path, before: int) -> bool:
    """Whether a start is in a phase and has saved a step after `before`."""
    return phases(log)[-1:] == [phase] and max(steps(workdir), default=0) > before


#: Which process is killed, and in which phase.
KILLED = ((1, "fit"), (0, "train"))


@pytest.mark.parametrize(
    "killed", [pytest.param(KILLED[1:], id="first"), pytest.param(KILLED, marks=pytest.mark.nightly, id="each in turn")]
)
def test_each_process_killed_in_turn(killed, launch, args, pair, tmp_path):
    """The other ends by itself, and the restart has lost no more than the steps since the last save."""
    workdir, saved, whole = tmp_path / "run", 0, rows(pair)
    for number, phase in killed:
        log = tmp_path / f"{number}.log"
        process = launch.start("train", *args, f"--workdir={workdir}", log=log, processes=2)
        newer = functools.partial(saved_in, phase, workdir, log, saved)
        assert wait_until(process, newer), log.read_text()[-3000:]
        saved = steps(workdir)[-1]
        os.kill(child(process, number), signal.SIGKILL)
        assert process.wait() == 128 + signal.SIGKILL, log.read_text()[-3000:]
        said = [line for line in log.read_text().splitlines() if line.startswith(f"[{1 - number}] ")]
        (line,) = (x for x in said if x.startswith(f"[{1 - number}] error: "))
        assert re.search(rf"error: process {number} \(pid \d+ on \S+\) has ended; start all processes again$", line)
        assert rows(workdir) == whole[: len(rows(workdir))]
    done = launch.ok("train", *args, f"--workdir={workdir}", processes=2)
    assert int(re.search(r"resumed at step (\d+)", done.stdout)[1]) >= saved
    assert_same(workdir, pair)


@pytest.mark.nightly
def test_logs_that_stay_on_the_devices(launch, args, reference, tmp_path):
    """Four devices of two processes learn as one does; a run that is asked to stop resumes to the bit."""
    args = (*args, "--config.train.log_on_device=True")
    launch.ok("train", *args, f"--workdir={tmp_path / 'four'}", processes=2, devices=2)
    launch.ok("train", *args, f"--workdir={tmp_path / 'one'}")
    for name in ("four", "one"):
        assert_close(tmp_path / name, reference)
    workdir = tmp_path / "stopped"
    assert stopped(launch, args, workdir, tmp_path / "log", "train", 1) == 75
    launch.ok("train", *args, f"--workdir={workdir}")
    assert_same(workdir, tmp_path / "one")
