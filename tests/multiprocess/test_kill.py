"""A training process is killed with SIGKILL in every phase and started again: the end must be the same to the bit."""

import dataclasses
import functools
import itertools
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

    Each start resumes where the kill before left it, so counts are of calls since the newest committed checkpoint.
    """

    phase: str  # the last that the process has announced
    function: str
    call: int
    committed: list[int] | None = None  # checkpoints, saved every 4 steps, the last 3 kept; None: one may be under way
    being_written: int | None = None
    rows: int | None = None  # of metrics.jsonl
    learned: bool = False
    result_begun: bool = False


ROLLOUT = "mmrf_jax.envs.rollout.unroll"  # of a block of requests of the log
FIT, UPDATE = "mmrf_jax.training.steps.fit_step", "mmrf_jax.training.steps.update_step"
MEASURE = "mmrf_jax.models.feedback_model.fitting.measure"  # between the two
GAP = "mmrf_jax.training.simulated_tests.model_exploitation_gap"  # at the end of a round
NEXT = "mmrf_jax.training.train_state.next_round"  # right before the round's end is saved
SERVER = "mmrf_jax.training.train_state.behavior_state"  # right after
COMMIT = "mmrf_jax.checkpointing.integrity.write"  # in the background: all is written, nothing committed
SEAL = "mmrf_jax.checkpointing.integrity.seal"  # right after the commit
SERVE = "mmrf_jax.abtest.simulate.rollout_user_metrics"  # an arm of the A/B test
SCORE = "mmrf_jax.training.predictions.score_and_predict"  # offline
WRITE = "mmrf_jax.io.files.write_json"  # starts.json first in each start, then learned.json or results.json
SYNC = "os.fsync"  # of a temporary file, then of its folder: starts.json, the A/B test's users, then results.json


def moments(whole: list[dict]) -> list[Moment]:
    """In the order of a run of two rounds with these rows of metrics."""
    at = [(row["step"], row["phase"]) for row in whole]
    middle, last = (step for step, phase in at if phase == "model_exploitation_gap")  # where the rounds end
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
        Moment("model_exploitation_gap", GAP, 1, rows=middle),
        Moment("model_exploitation_gap", NEXT, 1, rows=middle + 1),
        Moment("collect", SERVER, 1, rows=middle + 1),  # its agents collect the second round's log
        Moment("fit", FIT, 3),
        Moment("train", UPDATE, 2),
        Moment("model_exploitation_gap", GAP, 1, rows=last + 1),
        Moment("model_exploitation_gap", WRITE, 2, end, rows=last + 2),
        Moment("ab_test", SERVE, 2, end, rows=last + 2, learned=True),
        Moment("offline", SCORE, 1, end, rows=last + 2, learned=True),
        Moment("results", WRITE, 2, end, rows=last + 2, learned=True),
        Moment("results", SYNC, 5, end, rows=last + 2, learned=True, result_begun=True),
    ]


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param((0, 3, 6, 9, 12, 14, 16), id="some"),
        pytest.param(range(17), marks=pytest.mark.nightly, id="all"),
    ],
)
def test_killed_in_every_phase_one_after_another(chosen, launch, reference, args, tmp_path):
    """At some moments, none in the A/B test; every night at all of them."""
    workdir, whole = tmp_path / "run", rows(reference)
    all_moments = moments(whole)
    assert len(all_moments) == 17
    for number, moment in enumerate(all_moments[i] for i in chosen):
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


KILLS = 20
#: The phases in which a process can be killed once its start has saved something, in their order.
ORDER = ("collect", "fit", "train", "model_exploitation_gap", "ab_test", "offline", "results", "report")


def place(workdir, log) -> tuple[int, int]:
    """How far a run has come: its rows of metrics, and the number in `ORDER` of the phase of its newest start."""
    now = phases(log)[-1:]
    return len(rows(workdir)), ORDER.index(now[0]) if now and now[0] in ORDER else -1


@pytest.fixture(scope="module")
def course(launch, reference, args, tmp_path_factory) -> list[tuple[float, tuple[int, int]]]:
    """The places of an uninterrupted run that is compiled already, and when it came to each, in seconds; the last is
    its end."""
    folder = tmp_path_factory.mktemp("course")
    workdir, log = folder / "run", folder / "log"
    process = launch.start("train", *args, "--config.checkpoint_every=1", f"--workdir={workdir}", log=log)
    found: list[tuple[float, tuple[int, int]]] = []

    def evaluated() -> bool:
        at = place(workdir, log)
        if steps(workdir) and (not found or at > found[-1][1]):
            found.append((time.monotonic(), at))
        return (workdir / "results.json").exists()

    assert wait_until(process, evaluated), log.read_text()[-3000:]
    assert process.wait() == 0
    assert_same(workdir, reference)
    return found


def random_moments(course, draw: random.Random) -> list[tuple[tuple[int, int], float]]:
    """Where to kill, in order: a place, and seconds after it. One is in each phase of each round, early enough to meet
    it; the others are uniform over the time from the first save to the end."""
    times = [time for time, _ in course]
    entered = [0] + [i for i in range(1, len(course)) if course[i][1][1] != course[i - 1][1][1]]
    entered = [i for i in entered if ORDER[course[i][1][1]] not in ("results", "report")]
    ends = [times[i] for i in entered[1:]] + [times[-1]]
    drawn = [draw.uniform(times[i], (times[i] + end) / 2) for i, end in zip(entered, ends, strict=True)]
    drawn += [draw.uniform(times[0], times[-1]) for _ in range(KILLS - len(drawn))]
    last = [max(i for i, time in enumerate(times) if time <= at) for at in sorted(drawn)]
    return [(course[i][1], at - times[i]) for i, at in zip(last, sorted(drawn), strict=True)]


def arrived(workdir, log, before: int, moment: tuple[int, int]) -> bool:
    """Whether a start has come to a place, and has saved a step after `before` while there was something to learn."""
    at = place(workdir, log)
    saved = max(steps(workdir), default=-1) > before or at[1] >= ORDER.index("ab_test")
    return saved and at >= moment


#: Phases that kills must meet; collecting is over in a moment once the round before is saved, so it may be missed.
WANTED = {"fit", "train", "model_exploitation_gap", "ab_test", "offline"}


@pytest.mark.nightly
def test_killed_twenty_times_in_a_row(launch, reference, args, course, tmp_path):
    """At random moments of its work, each after the first save of its start while there is something left to save.

    Where a busy machine made the kills come late, more of them follow until every phase was met.
    """
    whole, met, ended, draw = rows(reference), [], 0, random.Random(0)
    again = itertools.chain.from_iterable(random_moments(course, draw) for _ in itertools.count())
    for number, (moment, after) in enumerate(again):
        if len(met) >= KILLS and set(met) >= WANTED:
            break
        workdir, log = tmp_path / f"run{ended}", tmp_path / f"{number}.log"
        before = max(steps(workdir), default=-1)
        process = launch.start("train", *args, "--config.checkpoint_every=1", f"--workdir={workdir}", log=log)
        if wait_until(process, functools.partial(arrived, workdir, log, before, moment)):
            time.sleep(after)
            process.kill()
        if process.wait() == 0:  # it was faster this time: begun again, for the kills that are left
            assert_same(workdir, reference)
            ended += 1
            continue
        assert process.returncode == -signal.SIGKILL, log.read_text()[-3000:]
        met.append(phases(log)[-1])
        assert rows(workdir) == whole[: len(rows(workdir))]
    launch.ok("train", *args, f"--workdir={workdir}")
    assert_same(workdir, reference)
