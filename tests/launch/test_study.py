"""`launch.study`: runs named by their configs, one table, and nothing done twice."""

import json

import pytest
from processes import TINY, error_line

from experiments import table_ablation
from mmrf_jax.training import study

#: The tiny world job as the run of a study.
RUN = [flag.replace("--config.", "--config.run.") for flag in TINY[1:] if "quick" not in flag]
STUDY = ("--config=experiments/table_ablation.py", "--config.quick=True", *RUN, "--config.sessions=64")


def test_runs_are_named_by_what_defines_them(tmp_path):
    config = table_ablation.get_config()
    config.run.update(config.when_quick.run)
    ours, theirs = (study.run_config(config, name, 3) for name in ("mmrf", "da"))
    assert ours.seed == 3 and ours.agents.ablation == "none" and theirs.agents.ablation == "da"
    assert ours.world.num_videos == 5_000 and "when_quick" not in ours
    names = {study.folder(one, tmp_path) for one in (ours, theirs, study.run_config(config, "mmrf", 4))}
    assert len(names) == 3 and {path.parent for path in names} == {tmp_path}
    ours.log_every = 7  # may change between two starts of one run
    assert study.folder(ours, tmp_path) in names
    config.variants.da.agents.ablatoin = "da"
    with pytest.raises(ValueError, match=r"variant da sets agents\.ablatoin"):
        study.run_config(config, "da", 0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("arms", ("nobody",), "unknown arm 'nobody' in config.arms; choose among production"),
        ("sessions", 1, "config.sessions is 1; use --config.sessions=2"),
        ("run.simulator", "feedback", "not of the world"),
        ("run.method", "myopic", "predicts no feedback"),
    ],
)
def test_a_study_that_would_fail_does_not_begin(field, value, message, tmp_path):
    config = table_ablation.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        study.run(config, tmp_path / "o", tmp_path / "r")
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_line(launch, tmp_path):
    done = launch("study", *STUDY, "--config.reference=nobody", f"--out={tmp_path / 'o'}", f"--runs={tmp_path / 'r'}")
    error_line(done, "config.reference='nobody'", "da, labels_only, mmrf, ns")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_study_writes_one_table_and_runs_nothing_twice(launch, tmp_path):
    out, runs = tmp_path / "out", tmp_path / "runs"
    launch.ok("study", *STUDY, f"--out={out}", f"--runs={runs}", timeout=900)
    table = json.loads((out / "table.json").read_text())
    assert list(table["ab_test"]) == sorted(table["ab_test"])
    assert set(table["ab_test"]) == {"mmrf", "da", "ns", "labels_only", "values_only", "production"}
    sizes = [json.loads((runs / names[0] / "config.json").read_text())["world"] for names in table["runs"].values()]
    assert {size["num_videos"] for size in sizes} == {1000}  # explicit, above the quick overlay
    rounds = table["optimism"]
    assert set(rounds) == {"mmrf", "ns", "labels_only", "values_only"} and {len(rows) for rows in rounds.values()} == {
        2
    }
    assert all(row["gap"] == pytest.approx(row["model"] - row["world"]) for row in rounds["mmrf"])
    assert table["ab_test"]["mmrf"]["watch_time"]["diff_pct"] == 0.0
    assert {"agents of mmrf", "model of mmrf", "agents of da"} <= set(table["errors"])
    assert "model of da" not in table["errors"]
    folders = sorted(runs.iterdir())
    assert sorted(path.name for names in table["runs"].values() for path in map(runs.__truediv__, names)) == [
        path.name for path in folders
    ]
    assert (out / "table.md").read_text().index("| mmrf |") < (out / "table.md").read_text().index("| da |")
    before = {path: path.read_bytes() for path in (out / "table.json", out / "table.md")}
    stamps = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}
    launch.ok("study", *STUDY, f"--out={out}", f"--runs={runs}", timeout=300)
    assert before == {path: path.read_bytes() for path in before}
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
