"""`heartbeat`: a process that never joins, ends, falls silent or hangs is named to all others. No JAX, no real time."""

import json
import queue
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmrf_jax.io import progress
from mmrf_jax.parallel import heartbeat
from mmrf_jax.parallel.heartbeat import HeartbeatMonitor, Limits, ProcessLost

NEVER = 1_000.0
QUICK = Limits(join=NEVER, silent=NEVER, stalled=NEVER, beat=0.01, grace=0.0)
WAIT = 600.0  # seconds after which a test gives up; it only ends a hang
RUNS: list["Run"] = []  # of the present test


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Run:
    """The processes of a run as threads of this one; `ended` gets (process, line) of each that is ended."""

    def __init__(self, port: int, number: int):
        RUNS.append(self)
        self.address, self.number = f"127.0.0.1:{port}", number
        self.ended: queue.Queue[tuple[int, str]] = queue.Queue()
        self.moved = [0] * number
        self.calls: dict[int, HeartbeatMonitor] = {}

    def come(self, index: int, limits: Limits) -> None:
        try:
            self.calls[index] = HeartbeatMonitor(
                self.address,
                self.number,
                index,
                lambda: self.moved[index],
                lambda line: self.ended.put((index, line)),
                limits,
            )
        except ProcessLost as lost:
            self.ended.put((index, str(lost)))

    def start(self, limits: Limits, indices: Iterator[int] | range | None = None) -> "Run":
        threads = [
            threading.Thread(target=self.come, args=(n, limits), daemon=True)
            for n in (range(self.number) if indices is None else indices)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        return self

    def lines(self, number: int) -> dict[int, str]:
        return dict(self.ended.get(timeout=WAIT) for _ in range(number))


def die(call: HeartbeatMonitor) -> None:
    """End a process without a word; the kernel closes its connections."""
    call._ended.set()
    for peer in call._peers.values():
        peer.close()


@pytest.fixture(autouse=True)
def no_heartbeat_outlives_its_test():
    """Other tests of this process should not be looked at a hundred times a second."""
    yield
    while RUNS:
        for call in RUNS.pop().calls.values():
            die(call)
    for thread in threading.enumerate():
        if thread.name == "heartbeat":
            thread.join(WAIT)
            assert not thread.is_alive()


def test_all_come_and_leave_in_agreement(port):
    run = Run(port, 3).start(QUICK)
    assert set(run.calls) == {0, 1, 2}
    for index in (1, 0, 2):
        run.calls[index].leave()
    for call in run.calls.values():
        for peer in call._peers.values():
            peer.close()
        assert call.lost(0.0) is None
    assert run.ended.empty()


@pytest.mark.parametrize(
    ("there", "line"),
    [
        ((0, 2), "process 1 of 3 did not join within 1 s"),
        ((0,), "processes 1, 2 of 3 did not join within 1 s"),
        ((1, 2), "process 0 of 3, at 127.0.0.1:{port}, did not join within 1 s"),
    ],
)
def test_who_never_comes_is_named_to_those_who_have(there, line, port):
    run = Run(port, 3).start(QUICK._replace(join=1.0), iter(there))
    assert run.lines(len(there)) == dict.fromkeys(there, line.format(port=port)) and not run.calls


@pytest.mark.parametrize("dies", [0, 2])
def test_who_ends_is_named_to_all_others(dies, port):
    run = Run(port, 3).start(QUICK)
    name = run.calls[dies]._me
    assert name.startswith(f"process {dies} (pid ")
    die(run.calls[dies])
    others = {0, 1, 2} - {dies}
    assert run.lines(2) == dict.fromkeys(others, f"{name} has ended")
    assert {run.calls[n].lost(0.0) for n in others} == {f"{name} has ended"}


def test_who_leaves_first_is_not_missed_when_another_ends(port):
    run = Run(port, 3).start(QUICK)
    run.calls[1].leave()
    die(run.calls[2])
    assert run.lines(1) == {0: f"{run.calls[2]._me} has ended"}
    assert run.calls[1].lost(0.0) is None


def test_who_falls_silent_is_named(port):
    """Process 1 answers the heartbeats and says nothing more, as one that is suspended."""
    run = Run(port, 2)
    first = threading.Thread(target=run.come, args=(0, QUICK._replace(silent=0.5)), daemon=True)
    first.start()
    while True:
        try:
            silent = socket.create_connection(("127.0.0.1", port), timeout=WAIT)
            break
        except ConnectionRefusedError:
            continue
    silent.sendall(json.dumps({"process": 1, "of": 2, "name": "process 1 (pid 7 on host)"}).encode() + b"\n")
    assert run.lines(1) == {0: "nothing has been heard of process 1 (pid 7 on host) for 0 s"}
    first.join(WAIT)
    silent.close()


def test_strangers_at_the_port_are_no_processes(port):
    run = Run(port, 2)
    first = threading.Thread(target=run.come, args=(0, QUICK), daemon=True)
    first.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"process": 1, "of": 3, "name": "of another run"}\n', b""):
        while True:
            try:
                stranger = socket.create_connection(("127.0.0.1", port), timeout=WAIT)
                break
            except ConnectionRefusedError:
                continue
        stranger.sendall(words)
        stranger.close()
    run.start(QUICK, iter([1]))
    first.join(WAIT)
    assert set(run.calls) == {0, 1} and run.ended.empty()
    for call in run.calls.values():
        call.leave()


def test_a_run_that_does_not_move_ends(monkeypatch, port):
    monkeypatch.setattr(heartbeat, "_place", lambda: {**heartbeat._NOWHERE, "at": "training/hooks.py:9 (after_step)"})
    run = Run(port, 2)
    run.moved = [5, 4]
    run.start(QUICK._replace(stalled=0.5))
    line = f"{run.calls[1]._me} hangs in training/hooks.py:9 (after_step): the run has not moved for 0 s"
    assert run.lines(2) == {0: line, 1: line}


def beat(moved: int, at: str, waits: bool):
    return {"moved": moved, "at": at, "waits": waits}


@pytest.mark.parametrize(
    ("beats", "guilty"),
    [
        ({"a": beat(5, "x", True), "b": beat(4, "y", True)}, "b hangs in y"),  # behind the others
        ({"a": beat(5, "x", True), "b": beat(5, "y", False)}, "b hangs in y"),  # they wait for it
        ({"a": beat(5, "x", True), "b": beat(5, "", True)}, "a hangs in x; b hangs in unknown code"),  # on the devices
    ],
)
def test_which_process_hangs(beats, guilty):
    assert heartbeat._hanging(beats, 30.0) == f"{guilty}: the run has not moved for 30 s"


def test_the_place_of_a_process_is_a_line_of_ours():
    """The main thread calls us back from `progress.check_interrupted`, and waits for another that looks where it is."""
    found = []

    def look() -> None:
        thread = threading.Thread(target=lambda: found.append(heartbeat._place()))
        thread.start()
        thread.join()

    look()
    with progress.interruptible(look):
        progress.check_interrupted()
    assert found[0] == {"at": "", "waits": False, "compiles": False}
    assert re.fullmatch(r"io/progress\.py:\d+ \(check_interrupted\)", found[1]["at"])


def test_libraries_in_a_checkout_of_our_name_are_not_our_code(monkeypatch):
    monkeypatch.setattr(heartbeat, "_PACKAGE", "/home/\\xe9/mmrf_jax/mmrf_jax/")
    dump = """Current thread 0x0000000000000007 (most recent call first):
  File "/home/\\xe9/mmrf_jax/mmrf_jax/parallel/heartbeat.py", line 1 in _place

Thread 0x0000000000000005 (most recent call first):
  File "/home/\\xe9/mmrf_jax/.venv/lib/python3.11/site-packages/jax/_src/array.py", line 615 in _value
  File "/home/\\xe9/mmrf_jax/.venv/lib/python3.11/threading.py", line 9 in wait
  File "/home/\\xe9/mmrf_jax/mmrf_jax/training/rounds.py", line 321 in _steps
  File "/home/\\xe9/mmrf_jax/mmrf_jax/training/train.py", line 7 in train_runs
"""
    assert heartbeat._read(dump, 5) == {"at": "training/rounds.py:321 (_steps)", "waits": True, "compiles": False}
    assert heartbeat._read(dump, 9) == heartbeat._NOWHERE


def test_no_frames_of_a_running_thread_are_walked():
    """`f_back` of a frame of another thread crashed CPython 3.11.7 once in some hundred thousand calls."""
    files = [
        path for path in (Path(__file__).parents[2] / "mmrf_jax").rglob("*.py") if "_current_frames" in path.read_text()
    ]
    assert not files
