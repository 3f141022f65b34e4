"""The service as a process: users who are served are those of rollouts, and its log is one to learn from."""

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import kuairand_files
import numpy as np
import processes
import pytest

from mmrf_jax.agents import registry
from mmrf_jax.cli import serving
from mmrf_jax.data.readers import feedback_log, feedback_sessions
from mmrf_jax.envs import collect
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.serving import service
from mmrf_jax.serving.artifact import load as load_artifact
from mmrf_jax.serving.demo import clients
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import configs, restore, run_folder, simulator_source, steps

USERS = 40


@pytest.fixture
def start(launch, request, tmp_path, monkeypatch):
    """Starts services of one log, by default of the finished run; all of them end with the test."""
    for name, value in launch.environment().items():
        monkeypatch.setenv(name, value)

    def begin(*flags, folder=None):
        folder = folder or request.getfixturevalue("artifact")
        return serving.service(folder, tmp_path / "log", tmp_path / "serve.log", f"--timeout={processes.HANG}", *flags)

    return begin


def post(url: str, path: str, body, headers=()) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"content-type": "application/json", **dict(headers)})
    try:
        with urllib.request.urlopen(request, timeout=processes.HANG) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def check_served_users(start, run: Path, log: Path, folder: Path | None = None) -> None:
    """Serve users by the artefact of a run, and compare what the service has logged with their rollouts."""
    config = configs.run_of(run_folder.read_config(run))
    partitioner = Partitioner()
    source = restore.source_of(config, partitioner)
    assert source.sim is not None
    key = simulator_source.log_key(3)
    with start(folder=folder) as server:
        served = clients.Clients(source.sim, key, 0, server.url).visit(1_000, USERS, together=16)
    assert served.failed == 0 and len(served.main) == USERS

    state = restore.load_state(config, source, run, partitioner)
    policy = registry.get(config.method).make_policy(
        state.agents, source.items, steps.agent_config(config, SHORT_VIDEO)
    )
    wanted = collect.collect(
        source.sim.with_items(source.items),
        policy,
        key,
        first_user=1_000,
        num_sessions=USERS,
        day=0,
        keep_scores=True,
    )

    def rows_of(videos):
        return videos

    found, report = feedback_sessions.read(log, source.spec, rows_of)
    assert sum(report["left_out"].values()) == 0 and report["requests"] == served.requests.sum()
    np.testing.assert_array_equal(found.user_id, wanted.user_id)
    np.testing.assert_array_equal(found.offsets, wanted.offsets)
    for name in ("terminated", "truncated", "candidates", "slate", "history_videos", "history_mask"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), name)
    for name in ("feedback", "profile", "context", "history_feedback", "log_propensity"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-6, atol=1e-6, err_msg=name)

    def unit(x):
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

    np.testing.assert_allclose(unit(found.scores), unit(wanted.scores), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["gru", pytest.param("transformer", marks=pytest.mark.nightly)])
def test_a_run_with_another_user_encoder_trains_exports_and_serves(start, launch, tmp_path, encoder):
    run, folder = tmp_path / "run", tmp_path / "artifact"
    settings = [f"--config.{room}.encoder={encoder}" for room in ("agents", "feedback")]
    launch.ok("train", *processes.TINY, *settings, "--config.alternation.rounds=1", f"--workdir={run}")
    found = processes.results(run)
    assert found["ab_test"]["mmrf"]["watch_time"]["mean"] > 0 and "click" in found["offline"]
    launch.ok("export", f"--workdir={run}", f"--out={folder}")
    check_served_users(start, run, tmp_path / "log", folder)


@pytest.mark.slow
def test_served_users_are_those_of_rollouts_and_can_be_learned_from(start, launch, finished, tmp_path):
    check_served_users(start, finished, tmp_path / "log")
    settings = ("--config.alternation.closed_loop=False", "--config.alternation.rounds=1")
    workdir = tmp_path / "run"
    launch.ok("train", *processes.TINY, *settings, f"--config.data.dir={tmp_path / 'log'}", f"--workdir={workdir}")
    assert processes.results(workdir)["train"]["sessions_of_last_round"] == USERS


def body(user: int, number: int, spec) -> dict:
    rng = np.random.default_rng([user, number])
    return {
        "user": {"id": user},
        "context": rng.normal(size=spec["context"] - 1).tolist(),
        "candidates": rng.permutation(spec["num_videos"])[: spec["candidates"]].tolist(),
    }


@pytest.mark.slow
def test_killed_under_load_it_loses_no_acknowledged_event(start, artifact, tmp_path):
    spec = json.loads((artifact / "manifest.json").read_text())["spec"]
    acknowledged: list[tuple[str, str]] = []
    counter = iter(range(10**9))

    wrong: list[BaseException] = []

    def users(*arguments) -> None:
        try:
            ask_and_answer(*arguments)
        except BaseException as error:
            wrong.append(error)

    def ask_and_answer(url: str, first: int, sent: list) -> None:
        """A client until the service is gone."""
        for number in range(10**6):
            user = first + number % 5
            try:
                status, slate = post(url, "/rank", body(user, number, spec))
                assert status == 200, slate
                event = {
                    "event_id": f"e{next(counter)}",
                    "request_id": slate["request_id"],
                    "videos": [{"video": shown["video"], "like": 1} for shown in slate["slate"]],
                    "left": number % 7 == 6,
                }
                sent.append(event)
                status, answer = post(url, "/feedback", event)
                assert status == 200 and not answer["duplicate"], answer
                acknowledged.append((event["event_id"], slate["request_id"]))
            except (OSError, http.client.HTTPException):  # refused, reset, or an answer cut short
                return

    last: list[list] = []
    for turn in range(4):
        with start() as server:
            for events in last:  # what was sent last before the kill, acknowledged or not, is sent again
                for event in events[-1:]:
                    known = event["event_id"] in {e for e, _ in acknowledged}
                    status, answer = post(server.url, "/feedback", event)
                    assert status == 200 and (answer["duplicate"] or not known), (status, answer)
                    acknowledged.append((event["event_id"], event["request_id"]))
            last = [[] for _ in range(4)]
            threads = [
                threading.Thread(target=users, args=(server.url, 1_000 * turn + 100 * i, last[i])) for i in range(4)
            ]
            for thread in threads:
                thread.start()
            enough = len(acknowledged) + 60
            while len(acknowledged) < enough and any(thread.is_alive() for thread in threads):
                threads[0].join(0.01)
            os.kill(server.process.pid, signal.SIGKILL)
            for thread in threads:
                thread.join()
            assert not wrong, wrong
    times: dict[str, int] = {}
    of_request: dict[str, str] = {}
    for record, _ in feedback_log.scan(tmp_path / "log"):
        if record["kind"] == "feedback":
            times[record["event"]] = times.get(record["event"], 0) + 1
            of_request[record["event"]] = record["request"]
    assert len(acknowledged) > 200
    assert set(times.values()) == {1}
    for event, request in acknowledged:
        assert of_request[event] == request


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host=0.0.0.0"], ["--host=0.0.0.0 can be reached by other machines", "--token_file"]),
        (["--token_file=/nowhere"], ["/nowhere"]),
        (["--artifact=/nowhere"], ["is no artefact", "mmrf export"]),
    ],
)
def test_a_start_that_cannot_be(launch, artifact, tmp_path, flags, said):
    given = [f"--artifact={artifact}", f"--log={tmp_path / 'log'}", "--port=0", *flags]
    processes.error_line(launch("serve", *given), *said)


def test_an_export_that_cannot_be(launch, finished, artifact, tmp_path):
    processes.error_line(launch("export", f"--workdir={finished}", f"--out={artifact}"), "exists")
    processes.error_line(launch("export", f"--workdir={tmp_path}", f"--out={tmp_path / 'a'}"), "config.json")


def test_limits_of_requests(start, artifact, tmp_path):
    (tmp_path / "token").write_text("a-long-enough-token\n")
    spec = json.loads((artifact / "manifest.json").read_text())["spec"]
    token = [("Authorization", "Bearer a-long-enough-token")]
    with start(f"--token_file={tmp_path / 'token'}", "--max_candidates=30") as server:
        good = body(1, 0, spec)
        status, answer = post(server.url, "/rank", good)
        assert status == 401 and "token" in answer["detail"][0]["msg"]
        assert post(server.url, "/rank", good, [("Authorization", "Bearer wrong")])[0] == 401
        assert post(server.url, "/rank", good, token)[0] == 200
        assert serving.health(server.url)["status"] == "ok"  # without one

        def field(body) -> list:
            status, answer = post(server.url, "/rank", body, token)
            assert status == 422, answer
            return answer["detail"][0]["loc"]

        assert field(good | {"candidates": list(range(31))}) == ["body", "candidates"]
        assert field(good | {"candidates": []}) == ["body", "candidates"]
        assert field(good | {"candidates": [1, 2, "3"]}) == ["body", "candidates", 2]
        assert field(good | {"candidates": [1, 2, 1]}) == ["body", "candidates", 2]
        assert field(good | {"candidates": [1, 2**63]}) == ["body", "candidates", 1]
        assert field(good | {"context": [0.0]}) == ["body", "context"]
        assert field(good | {"context": [*good["context"][:-1], "0.5"]})[:2] == ["body", "context"]
        assert field(good | {"context": [True, *good["context"][1:]]})[:2] == ["body", "context"]
        assert field(good | {"user": {"id": 2**31}}) == ["body", "user", "id"]
        assert field(good | {"user": {"id": 1, "profile": [1.0]}}) == ["body", "user", "profile"]
        assert field(good | {"k": spec["slate"] + 1}) == ["body", "k"]
        assert field(good | {"what": 1}) == ["body", "what"]
        history = [{"video": 1, "watch_time": -1.0}]
        assert field(good | {"user": {"id": 1, "history": history}})[-1] == "watch_time"
        assert post(server.url, "/rank", b"{", token)[0] == 422
        nan = json.dumps(good).replace("[", "[NaN, ", 1).encode()
        assert post(server.url, "/rank", nan, token)[0] == 422
        status, answer = post(server.url, "/rank", b" " * 300_000, token)
        assert status == 413 and "262144 bytes" in answer["detail"][0]["msg"]


@pytest.mark.slow
def test_whatever_its_document_allows_is_no_error_of_the_service(start, tmp_path):
    """schemathesis: bodies that fit the OpenAPI document, and bodies that do not."""
    with start() as server:
        checks = (
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
            "negative_data_rejection"
        )
        command = [
            Path(sys.executable).with_name("schemathesis"),
            "run",
            f"{server.url}/openapi.json",
            f"--checks={checks}",
            "--phases=examples,coverage,fuzzing",
            "--max-examples=40",
            "--workers=1",
            "--generation-deterministic",
            f"--request-timeout={processes.HANG}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=processes.HANG)
        assert done.returncode == 0, done.stdout[-6000:]
        assert serving.health(server.url)["status"] == "ok"


@pytest.mark.slow
def test_a_ranker_of_real_logs_learns_from_its_own_feedback(launch, tmp_path):
    """KuaiRand's layout: videos are called by its ids, from the files to the slates and back."""
    files = kuairand_files.write(tmp_path / "source")
    train = (
        "train",
        "--config=experiments/kuairand.py",
        "--config.quick=True",
        f"--config.data.dir={files}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.data.candidates=20",
        "--config.train.batch=16",
        "--config.feedback.batch=16",
    )
    launch.ok(*train, f"--workdir={tmp_path / 'run'}")
    launch.ok("export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'artifact'}")
    made = load_artifact(tmp_path / "artifact")
    ids = made.arrays["catalogue"]["video_id"][1:]  # row 0 is the unknown video
    spec, users, reported = made.spec, 24, len(SHORT_VIDEO)
    assert len(ids) == spec.num_videos - 1 and ids.min() >= 0 and not np.array_equal(ids, np.arange(1, len(ids) + 1))

    async def serve() -> None:
        made = service.Service(service.Settings(tmp_path / "artifact", tmp_path / "log", temperature=0.5))
        await made.start()
        rng = np.random.default_rng(0)
        for user in range(users):
            for number in range(3):
                candidates = rng.permutation(ids)[: spec.candidates]
                context = rng.normal(size=spec.context - 1).astype(np.float32)
                slate = await made.rank(service.Asked(user, candidates, context, k=spec.slate))
                assert not slate.unknown and set(slate.videos) <= set(candidates)
                feedback = (rng.random((spec.slate, reported)) < 0.4) * np.append(np.ones(reported - 1), 30.0)
                await made.feedback(f"{user}/{number}", slate.request, slate.videos, feedback, number == 2)
        await made.close()

    asyncio.run(serve())
    workdir = tmp_path / "again"
    launch.ok(*train, f"--config.data.served={tmp_path / 'log'}", f"--workdir={workdir}")
    assert processes.results(workdir)["train"]["sessions_of_last_round"] == users
    assert processes.results(workdir)["train"]["requests_of_last_round"] == 3 * users
