"""The mains on buckets: what a run survives there, and that each main reads and writes there what it does on a disk."""

import dataclasses
import json
import os
import re
import signal
import uuid

import pytest
from processes import HANG, TINY, error_line, phases, results, rows, wait_until
from test_serve import body, post

import mmrf_jax as mmrf
from mmrf_jax.cli import serving
from mmrf_jax.data import records
from mmrf_jax.data.readers import feedback_log
from mmrf_jax.data.readers.kuairand import builder
from mmrf_jax.io import files
from mmrf_jax.parallel import preemption

FIT, UPDATE = "mmrf_jax.training.steps.fit_step", "mmrf_jax.training.steps.update_step"
COMMIT = "mmrf_jax.checkpointing.integrity.write"  # in the background: all is written, nothing committed
SEAL = "mmrf_jax.checkpointing.integrity.seal"  # right after the commit
NEXT = "mmrf_jax.training.train_state.next_round"  # right before the round's end is saved
SCORE = "mmrf_jax.training.predictions.score_and_predict"  # offline
WRITE = "mmrf_jax.io.files.write_json"  # starts.json first in each start, then results.json


@dataclasses.dataclass(frozen=True)
class Moment:
    """Where a process is stopped: right before the Nth call of a function; what is complete then; and what comes."""

    phase: str | None  # the last that it has announced; None: it goes on in the background
    function: str
    call: int
    complete: list[int] | None = None
    comes: str = "kill"


MOMENTS = (
    Moment(None, COMMIT, 1, []),
    Moment(None, SEAL, 1, [5]),
    Moment("train", UPDATE, 3, comes="SIGTERM"),
    Moment("model_exploitation_gap", NEXT, 1),
    Moment("fit", FIT, 3),
    Moment("offline", SCORE, 1),
    Moment("results", WRITE, 2),
)
#: The bucket is in trouble from here on for a while; the process goes on to its end.
TROUBLE = Moment("train", UPDATE, 3)


@pytest.fixture
def bucket(google):
    return files.user_path(f"gs://bucket/{uuid.uuid4().hex}", "--workdir")


def complete(workdir) -> list[int]:
    """The committed checkpoints."""
    return sorted(
        int(path.name) for path in (workdir / "checkpoints").iterdir() if (path / "commit_success.txt").exists()
    )


def stopped(launch, log, moment, *args):
    """A process that stands still at a moment."""
    process = launch.start("train", *args, log=log, stop_at=(moment.function, moment.call))
    how = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code
    assert how == os.CLD_STOPPED, f"{moment}: the process ended\n{log.read_text()[-3000:]}"
    assert moment.phase in (None, phases(log)[-1]), moment
    return process


def end(process, log, moment) -> None:
    """Bring about what comes at a moment."""
    if moment.comes == "kill":
        process.kill()
        assert process.wait() == -signal.SIGKILL
        return
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    assert process.wait(HANG) == preemption.EXIT_CODE, log.read_text()[-3000:]
    assert re.search(r"saved step \d+", log.read_text())


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param((MOMENTS[0], MOMENTS[2], MOMENTS[-2]), marks=pytest.mark.slow, id="three"),
        pytest.param(MOMENTS, marks=pytest.mark.nightly, id="all"),
    ],
)
def test_a_run_in_a_bucket_survives_what_one_on_a_disk_does(moments, launch, finished, bucket, tmp_path):
    """Killed and stopped in turn; the end is the same to the bit."""
    workdir, whole = bucket / "run", rows(finished)
    for number, moment in enumerate(moments):
        log = tmp_path / f"{number}.log"
        process = stopped(launch, log, moment, *TINY, f"--workdir={workdir}")
        if moment.complete is not None:
            assert complete(workdir) == moment.complete, moment
        assert rows(workdir) == whole[: len(rows(workdir))]
        if number == 0:
            other = launch("train", *TINY, f"--workdir={workdir}")
            error_line(other, f"{workdir} is used by another process: process {process.pid} on ")
        end(process, log, moment)
    launch.ok("train", *TINY, f"--workdir={workdir}")
    assert_whole(workdir, finished)
    assert "nothing to do" in launch.ok("train", *TINY, f"--workdir={workdir}").stderr
    other = launch("train", *TINY, "--config.agents.dim=48", f"--workdir={workdir}")
    error_line(other, "config.agents.dim", str(workdir))


def assert_whole(workdir, finished) -> None:
    """A run in a bucket is what one on a disk is."""
    assert results(workdir) == results(finished) and rows(workdir) == rows(finished)
    assert (workdir / "report.html").exists() and list((workdir / "tensorboard").glob("events.*"))
    header, *lines = (workdir / "metrics.csv").read_text().splitlines()
    assert header.startswith("step,seed,phase") and len(lines) == len(rows(finished)) + 1


@pytest.mark.nightly
@pytest.mark.parametrize("trouble", [429, 503, "silence"])
def test_a_run_goes_on_when_its_bucket_answers_again(trouble, launch, finished, bucket, google, tmp_path):
    log = tmp_path / "log"
    process = stopped(launch, log, TROUBLE, *TINY, f"--workdir={bucket}")
    with google.in_trouble(trouble):
        process.send_signal(signal.SIGCONT)
        assert wait_until(process, lambda: google.met >= (2 if trouble == "silence" else 5))
    assert process.wait(HANG) == 0, log.read_text()[-3000:]
    said = [line for line in log.read_text().splitlines() if line.startswith("gs://")]
    lines = ["gs://bucket does not answer", "gs://bucket answers again"]
    assert [line.split(" (")[0] for line in said] in ([lines] if trouble != "silence" else [lines, []])
    assert_whole(bucket, finished)


@pytest.mark.nightly
def test_a_run_in_s3_is_resumed_after_a_kill(launch, finished, amazon, tmp_path, monkeypatch):
    """Orbax has no driver for it: a step is written on this machine, and copied in the background."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    workdir = files.user_path(f"s3://bucket/{uuid.uuid4().hex}/run", "--workdir")
    process = stopped(launch, tmp_path / "log", Moment("train", UPDATE, 3), *TINY, f"--workdir={workdir}")
    process.kill()
    process.wait()
    assert complete(workdir)[:1] == [5]
    launch.ok("train", *TINY, f"--workdir={workdir}")
    assert results(workdir) == results(finished) and rows(workdir) == rows(finished)


def test_no_permission_is_one_line_before_any_work(launch, bucket, google):
    with google.in_trouble(403):
        done = launch("train", *TINY, f"--workdir={bucket}")
        error_line(done, "no permission", str(bucket))
        assert "phase" not in done.stderr
        error_line(launch("synthesize", "--rows=100", f"--out={bucket / 'out'}"), "no permission", str(bucket / "out"))
    assert not bucket.exists()
    done = launch("train", *TINY, "--workdir=gs://nothing/run")
    error_line(done, "there is no such bucket; create it", "gs://nothing")
    error_line(launch("train", *TINY, "--workdir=nothing://bucket/run"), "no protocol of fsspec")


@pytest.mark.slow
def test_other_mains_read_and_write_buckets(launch, finished, artifact, bucket, google, tmp_path, monkeypatch):
    run, out = bucket / "run", bucket / "artefact"
    for path in finished.rglob("*"):
        if path.is_file():
            (run / path.relative_to(finished)).upload(path)  # as a tool would copy it
    launch.ok("evaluate", f"--workdir={run}")
    assert json.loads((run / "evaluation.json").read_text())["offline"] == results(finished)["offline"]
    (run / "report.html").unlink()
    assert launch.ok("report", f"--workdir={run}").stdout.strip() == str(run / "report.html")
    assert (run / "report.html").read_text().startswith("<!")
    launch.ok("export", f"--workdir={run}", f"--out={out}")
    error_line(launch("export", f"--workdir={run}", f"--out={out}"), f"{out} exists")
    assert [path.name for path in out.iterdir()] == [path.name for path in sorted(artifact.iterdir())]
    candidates = [3, 500, 20, 999]
    assert mmrf.load(str(out)).rank(candidates) == mmrf.load(artifact).rank(candidates)

    log, spec = bucket / "served", json.loads((out / "manifest.json").read_text())["spec"]
    for name, value in launch.environment().items():
        monkeypatch.setenv(name, value)
    with serving.service(out, log, tmp_path / "serve.log", f"--timeout={HANG}", "--temperature=0.25") as server:
        status, slate = post(server.url, "/rank", body(7, 0, spec))
        assert status == 200, slate
        event = {"event_id": "e", "request_id": slate["request_id"], "left": True}
        event["videos"] = [{"video": slate["slate"][0]["video"], "like": 1}]
        status, answer = post(server.url, "/feedback", event)
        assert status == 200, answer
        # It is in the bucket when it is acknowledged, whatever becomes of the process.
        assert [record["kind"] for record, _ in feedback_log.scan(log)] == ["rank", "feedback"]
    with serving.service(out, log, tmp_path / "again.log", f"--timeout={HANG}", "--temperature=0.25"):
        pass  # the users' store is made again from the log

    launch.ok("collect", *TINY, "--sessions=100", f"--out={bucket / 'log'}")
    assert records.read_log(bucket / "log")[0].num_sessions == 100
    launch.ok("ab_test", *TINY, f"--arms=production,{run}", "--sessions=64", f"--out={bucket / 'ab.json'}")
    assert json.loads((bucket / "ab.json").read_text())["ab_test"] == results(finished)["ab_test"]


@pytest.mark.slow
def test_logs_are_prepared_from_a_bucket_into_a_bucket(launch, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    log, out = bucket / "log", bucket / "records"
    launch.ok("synthesize", "--rows=2000", "--variant=pure", f"--out={log}")
    error_line(launch("synthesize", "--rows=2000", f"--out={log}"), str(log), "exists", "name a folder that does not")
    done = launch.ok("prepare", f"--source={log}", f"--out={out}", "--workers=1")
    assert f"rows -> {out}\n" in done.stdout and "rows/s" in done.stdout
    assert builder.KuaiRand.open(out).report["log"]["standard"]["rows"] == 2_000
    assert not any("unfinished" in str(path) for path in out.rglob("*"))
    assert "rows/s" not in launch.ok("prepare", f"--source={log}", f"--out={out}", "--workers=1").stdout
