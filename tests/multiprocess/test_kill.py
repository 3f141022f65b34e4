"""A training process is killed with SIGKILL in every phase and started again: the end must be the same to the bit."""

import dataclasses
import os
import random
import signal
import time

import pytest
from comparing import assert_same
from processes import phases, rows, steps, wait_until

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Moment:
    """Where a process is killed: right before the Nth call of a function, and what the folder must hold by then.

    Each start goes on where the kill before left it, so counts are of calls since the newest committed checkpoint.
    """

    phase: str  # the last that the process has announced
    function: str
    call: int
    committed: list[int] | None = None  # checkpoints, saved every 4 steps, the last 3 kept; None: one may be under way
    being_written: int | None = None
    rows: int | None = None  # of metrics.jsonl
    learned: bool = False
    result_begun: bool = False


ROLLOUT = "mmrf_jax.training.rollout.unroll"  # of a block of requests of the log
FIT, UPDATE = "mmrf_jax.training.alternation.fit_step", "mmrf_jax.training.alternation.update_step"
MEASURE = "mmrf_jax.simulators.feedback.fitting.measure"  # between the two
GAP = "mmrf_jax.training.judging.optimism"  # at the end of a round
NEXT = "mmrf_jax.training.alternation.next_round"  # right before the round's end is saved
SERVER = "mmrf_jax.training.alternation.server_state"  # right after
COMMIT = "mmrf_jax.checkpointing.integrity.write"  # in the background: all is written, nothing committed
SEAL = "mmrf_jax.checkpointing.integrity.seal"  # right after the commit
SERVE = "mmrf_jax.training.arms.serve_users"  # an arm of the A/B test
SCORE = "mmrf_jax.training.methods.score_batch"  # offline
WRITE = "mmrf_jax.metrics.files.write_json"  # learned.json, results.json
SYNC = "os.fsync"  # in write_json: the text is in a temporary file, and not yet in its place


def moments(whole: list[dict]) -> list[Moment]:
    """In the order of a run of two rounds with these rows of metrics."""
    at = [(row["step"], row["phase"]) for row in whole]
    middle, last = (step for step, phase in at if phase == "optimism")  # where the rounds end
    fits = sum(phase == "fit" for step, phase in at if step <= middle)
    assert 5 < fits < middle - 5 and len(whole) == last + 2
    end = sorted({*range(4, last, 4), middle, last})[-3:]  # what is kept in the end
    return [
        Moment("collect", ROLLOUT, 2, []),
        Moment("fit", FIT, 4, [], rows=2),  # three steps; the metrics of the third are still on the device
        Moment("fit", COMMIT, 1, [], being_written=4),
        Moment("fit", SEAL, 1, [4]),
        Moment("fit", MEASURE, 1, rows=fits),
        Moment("train", UPDATE, 3, rows=fits + 1),
        Moment("optimism", GAP, 1, rows=middle),
        Moment("optimism", NEXT, 1, rows=middle + 1),
        Moment("collect", SERVER, 1, rows=middle + 1),  # its agents collect the second round's log
        Moment("fit", FIT, 3),
        Moment("train", UPDATE, 2),
        Moment("optimism", GAP, 1, rows=last + 1),
        Moment("optimism", WRITE, 1, end, rows=last + 2),
        Moment("ab_test", SERVE, 2, end, rows=last + 2, learned=True),
        Moment("offline", SCORE, 1, end, rows=last + 2, learned=True),
        Moment("results", WRITE, 1, end, rows=last + 2, learned=True),
        Moment("results", SYNC, 1, end, rows=last + 2, learned=True, result_begun=True),
    ]


def test_killed_in_every_phase_one_after_another(launch, reference, args, tmp_path):
    workdir, whole = tmp_path / "run", rows(reference)
    for number, moment in enumerate(moments(whole)):
        log = tmp_path / f"{number}.log"
        stop = (moment.function, moment.call)
        process = launch.start("train", *args, f"--workdir={workdir}", log=log, stop_at=stop)
        how = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code
        assert how == os.CLD_STOPPED, f"{moment}: the process ended\n{log.read_text()[-3000:]}"
        # It stands still: what it said last and what is on the disk are what the kill meets.
        assert phases(log)[-1] == moment.phase, moment
        if moment.committed is not None:
            assert steps(workdir) == moment.committed, moment
            writing = [p.name.split(".")[0] for p in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")]
            assert writing == ([] if moment.being_written is None else [str(moment.being_written)]), moment
        assert moment.rows in (None, len(rows(workdir))), moment
        assert (workdir / "learned.json").exists() == moment.learned, moment
        assert any(workdir.glob(".results.json.*.tmp")) == moment.result_begun, moment
        assert not (workdir / "results.json").exists(), moment
        process.kill()
        assert process.wait() == -signal.SIGKILL, moment
        assert rows(workdir) == whole[: len(rows(workdir))], moment
    launch.ok("train", *args, f"--workdir={workdir}")
    assert_same(workdir, reference)


def claimed(workdir):
    return lambda: (workdir / "config.json").exists()


@pytest.fixture(scope="module")
def seconds(launch, reference, args, tmp_path_factory) -> float:
    """How long an uninterrupted run takes once it is compiled, from the moment that it has its folder."""
    folder = tmp_path_factory.mktemp("timed")
    process = launch.start("train", *args, f"--workdir={folder / 'run'}", log=folder / "log")
    assert wait_until(process, claimed(folder / "run"))
    started = time.monotonic()
    assert process.wait() == 0
    took = time.monotonic() - started
    assert_same(folder / "run", reference)
    return took


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_time(seed, launch, reference, args, seconds, tmp_path):
    draw = random.Random(seed)
    for attempt in range(10):
        workdir, log = tmp_path / f"run{attempt}", tmp_path / f"{attempt}.log"
        process = launch.start("train", *args, f"--workdir={workdir}", log=log)
        assert wait_until(process, claimed(workdir)), log.read_text()[-3000:]
        time.sleep(draw.uniform(0.0, seconds))
        process.kill()
        if process.wait() == -signal.SIGKILL:
            break
        assert process.returncode == 0, log.read_text()[-3000:]  # it was faster this time: draw again
    assert process.returncode == -signal.SIGKILL, f"no kill of 10 landed within {seconds:.1f} s"
    launch.ok("train", *args, f"--workdir={workdir}")
    assert_same(workdir, reference)
