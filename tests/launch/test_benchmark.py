"""The benchmark's file; what it measures is not asserted, for no test is timed."""

import json

import pytest
from processes import error_line

from mmrf_jax.cli.benchmarks import scale


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


def test_unknown_parts_are_refused(launch, tmp_path):
    done = launch("benchmark", "--suite=scale", "--parts=all", f"--out={tmp_path / 'scale.json'}")
    error_line(done, "unknown --parts=all; choose among rows, videos, users, processes, logs")


def test_scale_measures_logs():
    """Their records, and reading them; steps of several processes: tests/multiprocess/test_mains.py."""
    found = scale.logs(100_000, 1)
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
