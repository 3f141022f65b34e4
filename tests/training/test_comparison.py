"""Which runs a comparison reads, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmrf_jax.training import comparison, run_folder


def make_run(path: Path, seed: int = 0) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"method": "mmrf", "seed": seed}))
    return path


def names(folders, runs_dir=Path("none")):
    runs, notes = comparison.load_runs(folders, runs_dir)
    return [run.name for run in runs], notes


def test_runs_are_read_with_what_they_have(tmp_path):
    one, two = make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")
    (one / "results.json").write_text('{"train": {}}')
    (one / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2')  # it is still learning
    blocks = [{"watch_time": np.ones(2), "user_id": np.arange(2), "exposures": np.ones((1, 9))}] * 2
    run_folder.write_user_sums(one, blocks)
    (first, second), notes = comparison.load_runs([one, two], tmp_path)
    assert (first.name, second.name, notes) == (str(one), str(two), [])  # their folders have the same name
    assert (
        first.results == {"train": {}} and first.rows == [{"step": 1}] and set(first.users) == {"watch_time", "user_id"}
    )
    np.testing.assert_array_equal(first.users["user_id"], [0, 1, 0, 1])
    assert second.results == {} and second.rows == [] and second.users == {}


def test_a_folder_of_runs_stands_for_them(tmp_path):
    for number in (10, 2, 1):
        make_run(tmp_path / "all" / f"run_{number}")
    (tmp_path / "all" / "notes").mkdir()
    assert names([tmp_path / "all"]) == (["run_1", "run_2", "run_10"], [])


def sweep(tmp_path, variants, seeds):
    runs = {name: [f"{name}{seed}" for seed in range(seeds)] for name in variants}
    for folder in (folder for folders in runs.values() for folder in folders):
        make_run(tmp_path / "runs" / folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.json").write_text(json.dumps({"runs": runs}))
    return tmp_path / "out", tmp_path / "runs"


def test_a_sweep_is_its_variants_and_seeds(tmp_path):
    out, runs = sweep(tmp_path, ["mmrf", "bc"], 2)
    assert names([out], runs) == (["mmrf, seed 0", "mmrf, seed 1", "bc, seed 0", "bc, seed 1"], [])
    with pytest.raises(ValueError, match=r"run mmrf0 of the sweep .*out is not in .*; name the folder of its runs"):
        names([out], tmp_path)


def test_of_a_large_sweep_the_first_seed_is_shown(tmp_path):
    out, runs = sweep(tmp_path, ["mmrf", "bc", "iql"], 7)
    found, (note,) = names([out], runs)
    assert found == ["mmrf", "bc", "iql"] and "Of the 21 runs of" in note


def test_what_is_refused(tmp_path):
    run, none = make_run(tmp_path / "run"), tmp_path / "none"
    none.mkdir()
    for folders, line in (
        ([], r"0 runs to compare; name 2 to 20"),
        ([run], r"1 runs to compare"),
        ([run, run], r"run is named twice"),
        ([run, none], r"none is not a run folder: it has no config.json"),
        ([make_run(tmp_path / f"r{i}") for i in range(21)], r"21 runs to compare; name 2 to 20"),
    ):
        with pytest.raises(ValueError, match=line):
            names(folders)
    (run / run_folder.USERS).write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"ab_test_users.npz is damaged .*; remove it"):
        names([run, tmp_path / "r1"])
    (run / run_folder.USERS).unlink()
    (run / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged"):
        names([run, tmp_path / "r1"])
