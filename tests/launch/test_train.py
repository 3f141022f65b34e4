"""`launch.train` and `launch.evaluate` as a user starts them."""

import json
import re
import shutil

import kuairand_files
import processes
import pytest
from processes import ONE_ROUND, TINY, error_line, results

import mmrf_jax as mmrf
from mmrf_jax.metrics.offline import by_log
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import configs

METRICS = {*SHORT_VIDEO.names, "watch_time", "depth", "requests", "return_rate", "coverage", "gini", "ild"}


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_run_folder_holds_config_metrics_events_checkpoints_and_results(finished):
    config = json.loads((finished / "config.json").read_text())
    assert (
        config["collect"]["sessions"] == 100 and config["alternation"]["rounds"] == 2
    )  # override above, overlay below
    assert "when_quick" not in config
    *lines, last = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    kinds = ("compiling", "preparing", "collecting", "fitting", "training", "evaluating")
    assert last["phase"] == "time" and last["step"] == lines[-1]["step"]
    assert last.keys() - lines[-1].keys() == {f"seconds_{kind}" for kind in kinds}
    assert all(last[f"seconds_{kind}"] > 0 for kind in kinds)
    assert lines and all({"step", "seed", "phase", "seconds"} <= row.keys() for row in lines)
    at = [(row["step"], row["phase"] == "model_exploitation_gap") for row in lines]
    assert at == sorted(set(at)) and {row["seed"] for row in lines} == {0}
    order = [row["phase"] for row in lines]
    assert [a for a, b in zip(order, order[1:] + [None], strict=True) if a != b] == 2 * [
        "fit",
        "train",
        "model_exploitation_gap",
    ]
    assert list((finished / "tensorboard").glob("events.*"))
    result = results(finished)
    assert processes.steps(finished)[-1] == result["train"]["steps"] == lines[-1]["step"]
    assert 0 < result["train"]["updates"] < result["train"]["steps"]
    gaps = [row for row in lines if row["phase"] == "model_exploitation_gap"]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in gaps] == result["train"][
        "model_exploitation_gap"
    ]
    assert all(row["gap"] == pytest.approx(row["model"] - row["world"]) for row in gaps)


def test_results_have_the_form_of_the_contract(finished):
    result = results(finished)
    assert {"train", "ab_test", "offline", "model_quality"} <= result.keys()
    assert result["train"]["sessions_of_last_round"] == 100 and result["train"]["rounds"] == 2
    assert {"gauc", "logloss", "ece"} <= result["model_quality"]["click"]["model"].keys()
    assert {"mae", "rmse", "xauc"} <= result["model_quality"]["watch_time"]["model"].keys()
    assert set(result["ab_test"]) == {"production", "mmrf"}
    for arm in result["ab_test"].values():
        assert arm.keys() >= METRICS
        for entry in arm.values():
            assert entry.keys() - {"note"} == {"mean", "diff_pct", "ci95"}
            assert (entry["diff_pct"] is None) == (entry["ci95"] is None) == ("note" in entry)
            if entry["diff_pct"] is not None:
                low, high = entry["ci95"]
                assert -100 <= low <= entry["diff_pct"] <= high
    assert {entry["diff_pct"] for entry in result["ab_test"]["production"].values()} <= {0}
    for name, entry in result["offline"].items():
        assert {"gauc", "ci95", "eligible_users"} <= entry.keys(), name
    assert "gauc_agent" in result["offline"]["click"] and "watch_time_xauc" in result["offline"]
    assert "seconds" not in (finished / "results.json").read_text()


def test_a_finished_run_is_left_as_it_is_also_with_another_log_every(run, launch):
    before = snapshot(run)
    launch.ok("train", *TINY, f"--workdir={run}")
    assert snapshot(run) == before
    launch.ok("train", *TINY, "--config.log_every=3", f"--workdir={run}")
    assert snapshot(run) == before


def test_another_config_is_refused(run, launch):
    before = snapshot(run)
    done = launch("train", *TINY, "--config.agents.dim=48", f"--workdir={run}")
    error_line(done, "config.agents.dim", "32", "48", "--workdir")
    assert snapshot(run) == before


@pytest.mark.slow
def test_myopic_runs(launch, tmp_path):
    args = ("--config.method=myopic", *ONE_ROUND, f"--workdir={tmp_path / 'run'}")
    # The run's own ranker is an arm without being named, and once if it is.
    done = launch.ok("train", *TINY, "--config.ab_test.arms=('myopic','production')", *args)
    assert "| myopic" in done.stdout
    sentence = done.stdout.splitlines()[-1]
    assert re.match(r"myopic is (better than|worse than|not distinguishable from) production: ", sentence)
    result = results(tmp_path / "run")
    assert set(result["ab_test"]) == {"production", "myopic"} and result["train"]["updates"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert sentence in page.replace("&nbsp;", " ")  # the same on the terminal and on the page
    assert (
        page.count("method=myopic has no agents that work together") == 2
        and "method=myopic predicts no feedback" in page
    )


@pytest.mark.slow
def test_kuairand_trains_and_evaluate_gives_the_same_figures(launch, real_logs, tmp_path):
    workdir = tmp_path / "run"
    launch.ok(
        "train",
        "--config=experiments/kuairand.py",
        "--config.quick=True",
        f"--workdir={workdir}",
        f"--config.data.dir={real_logs}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.data.max_sessions=500",
        "--config.data.candidates=30",
    )
    result = results(workdir)
    offline = result["offline"]
    assert "ab_test" not in result and result["train"]["sessions_of_last_round"] == 500
    tables = by_log(result, "offline")
    assert set(tables) == {"test", "random_test", "test_frozen_history"}
    for table in tables.values():
        assert table["click"]["eligible_users"] > 0 and 0 < table["click"]["gauc"] < 1
        assert {"watch_time_median", "watch_time_xauc"} <= table.keys()
    launch.ok("evaluate", f"--workdir={workdir}")
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert by_log(evaluation, "offline") == tables
    estimated = evaluation["off_policy"]
    assert {name: x["propensities"] for name, x in estimated.items()} == {"test": "fitted", "random_test": "known"}
    assert len(estimated["test"]["behaviour"]["by_decile"]) == 10 and list(estimated["random_test"]["units"]) == [
        "video"
    ]
    quality = by_log(result, "model_quality")
    assert by_log(evaluation, "model_quality") == quality and set(quality) == set(tables)
    assert {"model", "per_video_mean", "logistic"} <= quality["test"]["click"].keys()
    # Only the users' histories differ: the baselines know none of them, and the agents do.
    for name in ("click", "long_view"):
        for ranker in ("popularity", "boosting"):
            gauc = offline[name]["against"][ranker]["gauc"]
            assert gauc is not None and gauc == tables["test_frozen_history"][name]["against"][ranker]["gauc"]
    assert offline["click"]["gauc"] != tables["test_frozen_history"]["click"]["gauc"]
    rivals = {"popularity", "boosting", "logistic", "critics", "feedback_model"}
    assert offline["click"]["by_duration"] and set(offline["watch_time_median"]["against"]) == rivals


@pytest.mark.slow
def test_kuairand_without_a_random_log_trains_and_empty_days_are_refused(launch, tmp_path):
    frames = kuairand_files.write(tmp_path / "source")
    for path in (frames / "data").glob("log_random*"):
        path.unlink()
    args = (
        "train",
        "--config=experiments/kuairand.py",
        "--config.quick=True",
        f"--config.data.dir={frames}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.data.candidates=20",
        "--config.train.batch=16",
        "--config.agents.dropout=0.0",
    )
    launch.ok(*args, "--config.data.stream=True", "--config.feedback.batch=16", f"--workdir={tmp_path / 'run'}")
    assert set(by_log(results(tmp_path / "run"), "offline")) == {"test", "test_frozen_history"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "There is no A/B test" in page and "as they were logged" in page and "explorer-data" in page
    done = launch(*args, "--config.data.test_from=20220601", f"--workdir={tmp_path / 'other'}")
    error_line(done, "test_from=20220601", "20220502", "change it")
    assert not (tmp_path / "other").exists()


def test_a_finished_run_is_loaded_ranked_with_and_exported_from_python(run, artifact, tmp_path):
    loaded = mmrf.load(run)
    assert loaded.results == results(run) and mmrf.load(artifact).results == loaded.results
    before = snapshot(run)
    again = mmrf.train(configs.run_of(loaded.config), run)
    assert again.results == loaded.results and snapshot(run) == before
    exported = loaded.export(tmp_path / "artefact")
    candidates = [3, 500, 20, 999]
    assert exported.rank(candidates, k=3) == mmrf.load(artifact).rank(candidates, k=3) == loaded.rank(candidates)[:3]
