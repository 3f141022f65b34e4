"""`launch.sweep`: runs named by their configs, one table, and nothing done twice."""

import dataclasses
import json

import pytest
from processes import TINY, error_line

from experiments import table_ablation
from mmrf_jax.sweeps import study, sweep

#: The tiny world job as the run of a study.
RUN = [flag.replace("--config.", "--config.run.") for flag in TINY[1:] if "quick" not in flag]
QUICK = ("--config.quick=True", *RUN, "--config.sessions=64")
STUDY = ("--config=experiments/table_ablation.py", *QUICK)
TABLES = (
    *("ab_test", "ab_test_exit_hazard", "by_day", "errors", "unseen", "offline"),
    *("model_exploitation_gap", "conflict"),
)
EVERYTHING = (
    *QUICK,
    f"--config.tables={TABLES}",
    "--config.arms=('production','popularity')",
    "--config.run.alternation.gap_sessions=64",
    "--config.run.alternation.conflict_batches=1",
)


def test_runs_are_named_by_what_defines_them(tmp_path):
    config = table_ablation.get_config()
    config.run.update(config.when_quick.run)
    ours, theirs = (study.run_config(config, name, 3) for name in ("mmrf", "da"))
    assert ours.seed == 3 and ours.agents.ablation == "none" and theirs.agents.ablation == "no_augmentation"
    assert ours.world is not None and ours.world.num_videos == 5_000
    names = {study.run_place(one, tmp_path) for one in (ours, theirs, study.run_config(config, "mmrf", 4))}
    assert len(names) == 3 and {path.parent for path in names} == {tmp_path}
    logged = dataclasses.replace(ours, log_every=7)  # may change between two starts of one run
    assert study.run_place(logged, tmp_path) in names
    config.variants.da.agents.ablatoin = "no_augmentation"
    with pytest.raises(ValueError, match=r"variant da sets agents\.ablatoin"):
        study.run_config(config, "da", 0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("arms", ("no one",), "unknown arm 'no one' in config.arms; choose among production"),
        ("sessions", 1, "config.sessions is 1; use --config.sessions=2"),
        ("run.simulator", "feedback", "not of the world"),
        ("run.method", "myopic", "predicts no feedback"),
        ("against.co", "no one", "'no one' in config.against is no variant; choose among mmrf, co, da, ns"),
        ("tables", ("ab",), "unknown table 'ab' in config.tables; choose among ab_test, "),
        ("tables", ("by_day",), "config.days is 4; use --config.days=5"),
        ("run.seeds", 2, "config.run.seeds=2 are trained side by side, but config.seeds=5 is no multiple of that"),
    ],
)
def test_a_study_that_would_fail_does_not_begin(field, value, message, tmp_path):
    config = table_ablation.get_config()
    config.update_from_flattened_dict({field: value, "days": 4})
    with pytest.raises(ValueError, match=message):
        sweep.run_study(config, tmp_path / "o", tmp_path / "r")
    assert not list(tmp_path.iterdir())


def test_seeds_of_a_variant_are_trained_side_by_side(tmp_path, monkeypatch):
    config, trained = table_ablation.get_config(), []
    config.update_from_flattened_dict({"seeds": 4, "run.seeds": 2, "tables": ()})
    config.variants = {"mmrf": {}, "da": {"agents": {"ablation": "no_augmentation"}}}
    monkeypatch.setattr(sweep.train, "train_runs", lambda runs, brief: trained.append(runs))
    sweep.run_study(config, tmp_path / "out", tmp_path / "runs")
    assert [[(run.agents.ablation, run.seed) for run in runs.values()] for runs in trained] == [
        [(ablation, seed), (ablation, seed + 1)] for ablation in ("none", "no_augmentation") for seed in (0, 2)
    ]
    config.run.seeds = 1  # the folders are those of seeds that are trained one by one
    assert all(study.run_place(run, tmp_path / "runs") == path for runs in trained for path, run in runs.items())
    assert all(
        run in (study.run_config(config, n, run.seed) for n in config.variants) for r in trained for run in r.values()
    )


def test_a_study_does_not_mix_requests_that_say_whether_they_are_random(tmp_path):
    config = table_ablation.get_config()
    config.variants.co.collect = {"random_share": 0.0}
    with pytest.raises(
        ValueError, match=r"variant co and mmrf differ .*; set collect\.random_share of the others to 0"
    ):
        sweep.run_study(config, tmp_path / "o", tmp_path / "r")


def test_unseen_videos_are_compared_with_a_feedback_model(tmp_path):
    config = table_ablation.get_config()
    config.reference, config.tables = "da", ("unseen",)
    with pytest.raises(ValueError, match=r"config\.reference='da' has no feedback model"):
        sweep.run_study(config, tmp_path / "o", tmp_path / "r")


def test_an_error_is_one_line(launch, tmp_path):
    done = launch("sweep", *STUDY, "--config.reference=no one", f"--out={tmp_path / 'o'}", f"--runs={tmp_path / 'r'}")
    error_line(done, "config.reference='no one'", "co, da, mmrf, ns")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_study_writes_one_table_and_runs_nothing_twice(launch, tmp_path):
    config, out, runs = tmp_path / "three.py", tmp_path / "out", tmp_path / "runs"
    config.write_text(
        "from experiments import table_ablation\n\n\n"
        "def get_config():\n"
        "    config = table_ablation.get_config()\n"
        "    del config.variants.ns\n"
        "    return config\n"
    )
    study = ("sweep", f"--config={config}", *EVERYTHING, f"--out={out}", f"--runs={runs}")
    launch.ok(*study)
    table = json.loads((out / "table.json").read_text())
    variants = {"mmrf", "co", "da"}
    assert list(table["ab_test"]) == sorted(table["ab_test"])
    for name in ("ab_test", "ab_test_exit_hazard", "by_day"):
        assert set(table[name]) == {*variants, "production", "popularity"}
    assert table["ab_test"]["mmrf"] != table["ab_test_exit_hazard"]["mmrf"]
    shares = [
        table["by_day"]["mmrf"][f"visits, {name}"]["mean"]
        for name in ("day 1", "days 2 to 3", "last 2 days", "late / early")
    ]
    assert shares[0] == 1.0 and 0.0 < shares[1] < 1.0 and shares[3] == pytest.approx(shares[2] / shares[1])
    assert set(table["offline"]) == variants
    assert table["offline"]["mmrf"]["GAUC long_view"]["mean"] is None  # of so few users
    assert table["offline"]["mmrf"]["NCIS watch_time"]["mean"] > 0.0
    sizes = [json.loads((runs / names[0] / "config.json").read_text())["world"] for names in table["runs"].values()]
    assert {size["num_videos"] for size in sizes} == {1000}  # explicit, above the quick overlay
    rounds = table["model_exploitation_gap"]
    assert set(rounds) == variants - {"da"} and {len(rows) for rows in rounds.values()} == {2}
    assert set(table["conflict"]) == variants and "actors/click" not in table["conflict"]["co"][0]
    assert all(-1.0 <= row["actors/click"] <= 1.0 for row in table["conflict"]["mmrf"])
    assert all(row["gap"] == pytest.approx(row["model"] - row["world"]) for row in rounds["mmrf"])
    assert table["ab_test"]["mmrf"]["watch_time"]["diff_pct"] == 0.0
    assert {"agents of mmrf", "model of mmrf", "agents of da"} <= set(table["errors"])
    assert set(table["unseen"]) == set(table["errors"]) and "model of da" not in table["errors"]
    unseen = table["unseen"]["model of mmrf"]
    assert 0.0 < unseen["click, ECE"]["mean"] < 1.0 and 0.0 < unseen["click, GAUC"]["mean"] < 1.0
    assert unseen["like, log-loss"]["mean"] > 0.0
    folders = sorted(path for path in runs.iterdir() if path.name != ".claims")
    assert sorted(path.name for names in table["runs"].values() for path in map(runs.__truediv__, names)) == [
        path.name for path in folders
    ]
    assert (out / "table.md").read_text().index("| mmrf |") < (out / "table.md").read_text().index("| da |")
    before = {path: path.read_bytes() for path in (out / "table.json", out / "table.md")}
    stamps = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}
    launch.ok(*study)
    assert before == {path: path.read_bytes() for path in before}
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


@pytest.mark.slow
def test_a_study_of_real_logs(launch, real_logs, tmp_path):
    config, out = tmp_path / "two.py", tmp_path / "out"
    config.write_text(
        "from experiments import table_offline_kuairand\n\n\n"
        "def get_config():\n"
        "    config = table_offline_kuairand.get_config()\n"
        "    config.variants = {'mmrf': {}, 'ltr': {'method': 'ltr'}}\n"
        "    return config\n"
    )
    data = {"dir": real_logs, "cache_dir": tmp_path / "cache", "max_sessions": 500, "candidates": 30}
    flags = ("--config.quick=True", *(f"--config.run.data.{name}={value}" for name, value in data.items()))
    launch.ok("sweep", f"--config={config}", *flags, f"--out={out}", f"--runs={tmp_path / 'runs'}")
    table = json.loads((out / "table.json").read_text())
    for name in ("offline", "offline_frozen", "offline_random"):
        assert set(table[name]) == {"mmrf", "ltr"}
        for variant, row in table[name].items():
            assert 0.4 < row["GAUC click"]["mean"] < 0.8, (name, variant)
    assert table["offline"]["mmrf"]["GAUC click"] != table["offline_frozen"]["mmrf"]["GAUC click"]
    # feedback of the random log is worth something whichever policy ranks, and its propensities are known
    assert 0.0 < table["offline_random"]["mmrf"]["NCIS click"]["mean"] < 1.0
    assert table["offline"]["ltr"]["GAUC click"]["ci95"] is None  # of one seed
