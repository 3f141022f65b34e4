"""The benchmark's file; what it measures is not asserted, for no test is timed."""

import json


def test_benchmark_writes_what_it_prints(launch, tmp_path):
    out = tmp_path / "benchmark.json"
    done = launch.ok("benchmark", "--suite=rollouts", "--max_users=1024", "--repeats=1", f"--out={out}")
    found = json.loads(out.read_text())
    names = [entry["name"] for entry in found["results"]]
    assert "rollout/wall/users=1024" in names and "rollout/cpu/users=1024" in names and "peak_memory" in names
    assert all(entry["value"] > 0 and entry["unit"] for entry in found["results"])
    assert all(name in done.stdout for name in names) and found["machine"]["cores"] >= 1
