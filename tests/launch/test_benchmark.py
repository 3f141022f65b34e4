"""The benchmark's file; what it measures is not asserted, for no test is timed."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from processes import error_line

from mmrf_jax.cli.benchmarks import accelerator, cost, scale


@pytest.mark.slow
def test_benchmark_writes_what_it_prints(launch, tmp_path):
    out = tmp_path / "benchmark.json"
    done = launch.ok("benchmark", "--suite=rollouts", "--max_users=1024", "--repeats=1", f"--out={out}")
    found = json.loads(out.read_text())
    names = [entry["name"] for entry in found["results"]]
    assert "rollout/wall/users=1024" in names and "rollout/cpu/users=1024" in names and "peak_memory" in names
    assert all(entry["value"] > 0 and entry["unit"] for entry in found["results"])
    assert all(name in done.stdout for name in names) and found["machine"]["cores"] >= 1


@pytest.mark.slow
def test_scale_measures_each_size_alone_and_draws_it(launch, tmp_path):
    out, plot = tmp_path / "scale.json", tmp_path / "scale.png"
    flags = ["--max_size=10000", "--repeats=1", f"--out={out}", f"--plot={plot}"]
    launch.ok("benchmark", "--suite=scale", "--parts=videos", *flags)
    found = {entry["name"]: entry for entry in json.loads(out.read_text())["results"]}
    assert set(found) == {"videos/request/10000", "videos/memory/10000", "videos/request/growth"}
    assert found["videos/request/growth"]["value"] == 1.0 and found["videos/memory/10000"]["unit"] == "GiB"
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_checkpoints_are_measured_where_they_are_saved(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out = tmp_path / "checkpoints.json"
    flags = ["--max_size=1000", "--repeats=1", f"--out={out}"]
    for at in (tmp_path / "there", "memory://bucket/there"):
        launch.ok("benchmark", "--suite=checkpoints", f"--at={at}", *flags)
        found = {entry["name"].removeprefix("checkpoints/"): entry for entry in json.loads(out.read_text())["results"]}
        assert found["stall of 500 steps by a save"]["value"] == pytest.approx(
            100 * found["save"]["value"] / (500 * found["step"]["value"] / 1e3)
        )
    assert not list((tmp_path / "there").iterdir())
    error_line(launch("benchmark", "--suite=checkpoints", *flags), "needs --at=FOLDER")


def test_unknown_parts_are_refused(launch, tmp_path):
    done = launch("benchmark", "--suite=scale", "--parts=all", f"--out={tmp_path / 'scale.json'}")
    error_line(done, "unknown --parts=all; choose among rows, videos, users, processes, logs")


@pytest.mark.slow
def test_scale_measures_logs():
    """Their records, and reading them; steps of several processes: tests/multiprocess/test_mains.py."""
    found = scale.logs(20_000, 1)
    assert {name: unit for name, (_, unit) in found.items()} == {"prepared row": "us", "batch read": "ms"}
    assert all(value > 0.0 for value, _ in found.values())


@pytest.mark.slow
def test_speed_stands_beside_the_limit_of_the_machine(launch, tmp_path):
    out, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    launch.ok(
        "benchmark", "--suite=speed", "--parts=machine,evaluating", "--repeats=1", f"--out={out}", f"--plot={plot}"
    )
    found = {entry["name"]: entry for entry in json.loads(out.read_text())["results"]}
    assert set(found) == {"machine/product", "machine/copy", "machine/memory", "offline/gauc", "evaluating/memory"}
    gauc = found["offline/gauc"]
    assert gauc["fraction_of_limit"] == gauc["value"] / gauc["limit"] > 0.0 and gauc["unit"] == "rows/s"
    assert "limit" not in found["machine/copy"] and plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_suite_of_accelerators_runs_on_a_cpu_and_saves_each_part(launch, tmp_path):
    """Its smaller form: of the job, of steps and of rollouts."""
    out = tmp_path / "accelerator.json"
    done = launch.ok("benchmark", "--suite=accelerator", "--parts=batch=32,rollouts", f"--out={out}")
    found = json.loads(out.read_text())
    entries = {entry["name"]: entry for entry in found["results"]}
    steps = {f"{step}/batch=8{what}" for step in ("fit", "update") for what in ("", "/busy", "/kernels")}
    served = {f"rollout/{policy}/users={n}" for policy in ("random", "mmrf") for n in (256, 1_024)}
    assert set(entries) == {*steps, *served, "batch=8/memory", "rollouts/memory"}
    assert all(entry["value"] > 0 and entry["unit"] for entry in entries.values())
    assert all(0.0 < entries[f"{step}/batch=8/busy"]["value"] <= 1.0 for step in ("fit", "update"))
    assert found["machine"]["devices"] and "accelerator 2/2" in done.stderr


@pytest.mark.nightly
def test_seeds_side_by_side_are_measured_against_one(launch, tmp_path):
    out = tmp_path / "accelerator.json"
    launch.ok("benchmark", "--suite=accelerator", "--parts=seeds", f"--out={out}")
    found = {entry["name"]: entry["value"] for entry in json.loads(out.read_text())["results"]}
    assert len(found) == 7 and found["seeds/memory"] > 0
    for step in ("fit", "update"):  # both seeds' requests, in their time
        both, one, times = (found[f"{step}/seeds={what}"] for what in ("2", "1", "2/time"))
        assert both == pytest.approx(2 * one / times)


def test_the_suite_of_accelerators_saves_after_each_part_and_a_failed_one_loses_no_other(monkeypatch):
    def fails(sizes):
        raise ValueError("out of memory")
        yield

    monkeypatch.setattr(accelerator.cost, "alone", lambda function, *arguments, limit: function(*arguments))
    parts = {"job": lambda sizes: iter([("a", 1.0, "s")]), "batch=8": fails, "rollouts": lambda sizes: iter([])}
    monkeypatch.setattr(accelerator, "_parts", lambda sizes: parts)
    monkeypatch.setattr(accelerator, "PARTS", tuple(parts))
    saved = []
    with pytest.raises(RuntimeError, match="batch=8: out of memory"):
        accelerator.accelerator(list(parts), True, lambda results: saved.append([one["name"] for one in results]))
    assert saved == [["a"], ["a"], ["a", "rollouts/memory"]]


@pytest.mark.slow
def test_a_process_ends_at_its_limit():
    with pytest.raises(RuntimeError, match="not done after 0 s"):
        cost.alone(divmod, 7, 2, limit=0.0)


def test_a_process_that_dies_is_an_error_and_no_endless_wait():
    with pytest.raises(RuntimeError, match="died with exit code 3"):
        cost.alone(os._exit, 3)


@pytest.mark.slow
def test_a_fresh_process_gives_its_result_or_its_error():
    assert cost.alone(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        cost.alone(divmod, 7, 0)


def test_the_main_job_is_timed_by_activity(monkeypatch):
    def run(command, **_):
        folder = Path(command[-1].removeprefix("--workdir="))
        folder.mkdir()
        rows = [{"phase": "train"}, {"phase": "time", "seconds_compiling": 2.0, "seconds_training": 3.0}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(accelerator.subprocess, "run", run)
    (name, wall, unit), *rest = accelerator.main_job(accelerator._SMALL)
    assert name == "main job/wall" and wall > 0.0 and unit == "s"
    assert rest == [("main job/compiling", 2.0, "s"), ("main job/training", 3.0, "s")]
