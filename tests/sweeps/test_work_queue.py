"""`sweeps.work_queue`: tasks run once, in any process; those of a killed process are taken over, others not."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import table_ablation
from mmrf_jax.io import files
from mmrf_jax.sweeps import measurements, study, sweep, work_queue

ROOT = Path(__file__).resolve().parents[2]


def tasks_of(folder: Path, number: int, did: list[int], after: dict[int, set[int]] | None = None):
    def task(n: int) -> work_queue.Task:
        return work_queue.Task(folder / str(n), lambda: did.append(n), frozenset((after or {}).get(n, ())))

    return [task(n) for n in range(number)]


def test_one_process_does_all_tasks_in_order_and_each_after_what_it_needs(tmp_path):
    did: list[int] = []
    assert (
        work_queue.work(
            tasks_of(tmp_path, 4, did, after={0: {2}, 1: {3}}),
        )
        == 0
    )
    assert did == [2, 3, 0, 1]


def test_a_task_of_a_living_process_is_left_alone_with_those_that_need_it(tmp_path):
    did: list[int] = []
    with contextlib.ExitStack() as other:
        assert work_queue.claim(tmp_path / "1", other)
        assert work_queue.work(tasks_of(tmp_path, 4, did, after={3: {1}})) == 2
    assert did == [0, 2]
    assert work_queue.work(tasks_of(tmp_path, 4, did, after={3: {1}})) == 0
    assert did == [0, 2, 0, 1, 2, 3]  # those that are done find it out themselves


def test_a_task_for_several_is_left_alone_if_one_of_them_is_another_process_s(tmp_path):
    did: list[int] = []
    tasks = [
        work_queue.Task(tmp_path / "0", lambda: did.append(0), more=(tmp_path / "1",)),
        *tasks_of(tmp_path, 3, did)[2:],
    ]
    with contextlib.ExitStack() as other:
        assert work_queue.claim(tmp_path / "1", other)
        assert work_queue.work(tasks) == 1 and did == [2]
        assert work_queue.claim(tmp_path / "0", other)  # what was free is free again
    assert work_queue.work(tasks) == 0 and did == [2, 0, 2]


#: A worker: the folder, the number of tasks, and the one in which it kills itself. A task that is done has a file.
WORKER = """
import functools, os, signal, sys
from pathlib import Path
from mmrf_jax.sweeps import work_queue

folder, number, dies = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def run(n):
    if (folder / f"done{n}").exists():
        return
    with (folder / "log").open("a") as log:
        log.write(f"{n}\\n")
    if str(n) == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / f"done{n}").touch()

sys.exit(work_queue.work([work_queue.Task(folder / str(n), functools.partial(run, n)) for n in range(number)]))
"""


def worker(folder: Path, number: int, dies: str = "") -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(number), dies], env=env, cwd=ROOT)


def done_by(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "log").read_text().splitlines()]


@pytest.mark.slow
def test_the_task_of_a_killed_process_is_taken_over(tmp_path):
    assert worker(tmp_path, 4, dies="1").wait() == -signal.SIGKILL
    assert worker(tmp_path, 4).wait() == 0
    assert done_by(tmp_path) == [0, 1, 1, 2, 3]


@pytest.mark.slow
def test_processes_do_each_task_once(tmp_path):
    processes = [worker(tmp_path, 12) for _ in range(2)]
    assert 0 in [process.wait() for process in processes]  # the last of them has seen all done
    assert sorted(done_by(tmp_path)) == list(range(12))


def a_study(**changes):
    config = table_ablation.get_config()
    config.update({"seeds": 2, "tables": ("model_exploitation_gap",)} | changes)
    return config


def learned(place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "learned.json").write_text(json.dumps({"model_exploitation_gap": [{"gap": 1.5}]}))


def test_processes_share_the_runs_of_a_study_and_the_last_writes_the_table(monkeypatch, tmp_path):
    """While one process trains the first run, another does the rest and ends without the table."""
    config, out, runs = a_study(), tmp_path / "out", tmp_path / "runs"
    trained, inside = [], []

    def train(runs_of_task, brief):
        (place,) = runs_of_task
        if not trained:
            trained.append(place)
            inside.append(sweep.run_study(config, out, runs))
            assert not (out / "table.json").exists()
        elif not (place / "learned.json").exists():
            trained.append(place)
        learned(place)

    monkeypatch.setattr(sweep.train, "train_runs", train)
    table = sweep.run_study(config, out, runs)
    assert inside == [None] and len(trained) == len(set(trained)) == 8
    assert table is not None and set(table["model_exploitation_gap"]) == {"mmrf", "co", "da", "ns"}
    assert json.loads((out / "table.json").read_text())["runs"] == table["runs"]


def test_an_ab_test_waits_for_the_runs_of_its_seed_alone(monkeypatch, tmp_path):
    """Another process trains a run of seed 1, so the A/B test of seed 0 is all that can be done, once."""
    config, out, runs = a_study(tables=("ab_test",)), tmp_path / "out", tmp_path / "runs"
    tested: list[int] = []
    table = measurements.TABLES["ab_test"]._replace(measure=lambda study, seed: tested.append(seed) or {})
    monkeypatch.setitem(measurements.TABLES, "ab_test", table)
    monkeypatch.setattr(sweep.train, "train_runs", lambda runs, brief: [learned(place) for place in runs])
    taken = study.run_place(study.run_config(config, "ns", 1), runs).name
    claim = runs / ".claims" / taken
    claim.mkdir(parents=True)
    with files.held(claim):
        assert sweep.run_study(config, out, runs) is None
    assert tested == [0] and not (runs / taken).exists()
