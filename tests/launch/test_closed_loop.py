"""The loop of serving and training on a tiny world: no request fails while rankers are swapped, and it goes on."""

import json
import signal

import processes
import pytest

from mmrf_jax.cli import closed_loop

SESSIONS = 64


@pytest.mark.slow
def test_rankers_are_served_learned_from_and_swapped(launch, tmp_path):
    folder, log = tmp_path / processes.ODD, tmp_path / "log"
    folder.mkdir()
    shape = (*processes.TINY[1:], f"--sessions={SESSIONS}", "--rounds=2")  # with its default config
    stopped = launch.start("closed_loop", *shape, "--workdir=[loop]", log=log, cwd=folder)  # in the middle of a round
    workdir = folder / "[loop]"
    arguments = (*processes.TINY, *shape[-2:], f"--workdir={workdir}")
    assert processes.wait_until(stopped, lambda: "round 1: train" in log.read_text())
    stopped.send_signal(signal.SIGKILL)
    stopped.wait()
    done = launch.ok("closed_loop", *arguments)
    assert "round 1: serve" not in done.stderr  # it was measured before
    made = json.loads((workdir / "loop.json").read_text())
    assert [row["round"] for row in made["rounds"]] == [1, 2]
    for row in made["rounds"]:
        assert row["sessions"] == SESSIONS and row["failed"] == row["failed_during_swap"] == 0
        assert row["watch_time"]["mean"] > 0 and row["watch_time"]["ci95"] > 0
        assert row["sessions_during_swap"] > 0
    assert len({row["artifact"] for row in made["rounds"]}) == 2
    assert (workdir / "current").resolve() == workdir / "artifacts" / "2"
    learned = json.loads((workdir / "runs" / "2" / "learned.json").read_text())
    swapped = made["rounds"][0]["sessions_during_swap"]
    assert learned["sessions_of_last_round"] >= 2 * SESSIONS + swapped
    lines = done.stdout.splitlines()
    assert lines == closed_loop.table(made["production"], made["rounds"])

    again = launch.ok("closed_loop", *arguments)
    assert again.stdout.splitlines() == lines
    processes.error_line(launch("closed_loop", *arguments, "--sessions=65"), "was made with sessions=64, now it is 65")


def test_the_table_says_whether_watch_time_grew():
    def row(number: int, mean: float, half: float) -> dict:
        measured = {"watch_time": {"mean": mean, "ci95": half}, "depth": {"mean": 50.0, "ci95": 1.0}}
        return {"round": number, "artifact": "a", "sessions": 10, "failed": 1, "failed_during_swap": 2} | measured

    rows = [row(1, 1000.0, 30.0), row(2, 1060.0, 40.0), row(3, 1070.0, 40.0), row(4, 900.0, 10.0)]
    lines = closed_loop.table({"mean": 900.0, "ci95": 12.0}, rows)
    assert lines[3] == "| 1 | a | 10 | 1,000 ± 30 | 50.0 ± 1.0 | 3 |"
    assert lines[-3:] == [
        "From round 1 to 2 watch time grew: +60 s [+10, +110].",  # 50 = (30² + 40²)^½
        "From round 2 to 3 watch time did not change beyond chance: +10 s [-47, +67].",
        "From round 3 to 4 watch time fell: -170 s [-211, -129].",
    ]
