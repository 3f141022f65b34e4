"""`launch.collect` writes what `launch.train` reads; `launch.ab_test` compares what it wrote."""

import json
import shutil

import numpy as np
import pytest
from processes import TINY, error_line, results

from mmrf_jax.data import records


@pytest.mark.slow
def test_a_collected_log_trains(launch, tmp_path):
    log_dir, run = tmp_path / "log", tmp_path / "run"
    done = launch.ok("collect", *TINY, "--sessions=100", f"--out={log_dir}")
    log, _ = records.read_log(log_dir)
    assert log.num_sessions == 100 and log.scores is not None
    assert f"100 sessions, {log.num_requests} requests" in done.stdout
    assert np.isfinite(log.log_propensity).all()
    error_line(launch("collect", *TINY, "--sessions=100", f"--out={log_dir}"), "exists", str(log_dir))

    launch.ok("train", *TINY, f"--config.data.dir={log_dir}", "--config.alternation.rounds=1", f"--workdir={run}")
    train = results(run)["train"]
    assert (train["sessions_of_last_round"], train["requests_of_last_round"]) == (100, log.num_requests)

    other = launch(
        "train", *TINY, f"--config.data.dir={log_dir}", "--config.world.seed=1", f"--workdir={tmp_path / 'o'}"
    )
    error_line(other, "seed=0, 1 is asked for", "collect it again")
    assert not (tmp_path / "o").exists()
    (log_dir / "manifest.json").write_text('{"version": 2}')
    error_line(launch("train", *TINY, f"--config.data.dir={log_dir}", f"--workdir={tmp_path / 'o'}"), "cannot be used")


@pytest.mark.slow
def test_ab_test_of_a_run_folder_gives_the_figures_of_its_results(launch, finished, tmp_path):
    out = tmp_path / "ab.json"
    launch.ok("ab_test", *TINY, f"--arms=production,{finished}", "--sessions=64", f"--out={out}")
    found = json.loads(out.read_text())["ab_test"]
    assert set(found) == {"production", "mmrf"} and found == results(finished)["ab_test"]

    done = launch("ab_test", *TINY, "--arms=production,nosuch", "--sessions=64", f"--out={tmp_path / 'no.json'}")
    error_line(done, "unknown policy 'nosuch'", "production", "popularity", "run folder")
    assert not (tmp_path / "no.json").exists()
    done = launch("ab_test", "--config=experiments/kuairand.py", "--arms=production,random", f"--out={tmp_path / 'a'}")
    error_line(done, "needs the world", "'kuairand'", "--config=world")
    done = launch("ab_test", *TINY, "--arms=production,random", f"--out={tmp_path}")
    error_line(done, "is a folder", "name a file")
    done = launch("collect", *TINY, "--sessions=200", "--first_user=2147483600", f"--out={tmp_path / 'l'}")
    error_line(done, "2147483600", "lower first_user")
    done = launch("ab_test", *TINY, "--arms=production,random", "--cuped", f"--out={out}")
    error_line(done, "--cuped", "add --hashed")
    done = launch("ab_test", *TINY, "--arms=production,random", "--aa=5", f"--out={out}")
    error_line(done, "--aa=5", "one arm")
    done = launch("ab_test", *TINY, "--arms=production", "--days=62", f"--out={out}")
    error_line(done, "days 0 to 61", "at most 61 days")
    done = launch.ok("evaluate", "--workdir", shutil.copytree(finished, tmp_path / "run"))
    assert "off-policy estimates of the stochastic ranker, test, logged propensities" in done.stdout
    estimated = json.loads((tmp_path / "run" / "evaluation.json").read_text())["off_policy"]["test"]
    assert set(estimated["units"]) == {"video", "slate", "session"} and estimated["propensities"] == "logged"
    clicks = estimated["units"]["video"]["signals"]["click"]
    for entry in (clicks["logged"], clicks["dm"], clicks["dr"]["10"], clicks["ncis"]["inf"]):
        assert 0 < entry["ci95"][0] < entry["value"] < entry["ci95"][1] < 1


@pytest.mark.slow
def test_tests_by_hash_over_days_and_of_no_difference(launch, tmp_path):
    arms = ("--arms=production,random", "--hashed", "--cuped", "--always_valid", "--sessions=300")
    done = launch.ok(
        "ab_test", *TINY, *arms, "--days=4", f"--out={tmp_path / 'd.json'}", f"--plot={tmp_path / 'd.png'}"
    )
    found = json.loads((tmp_path / "d.json").read_text())
    assert [row["day"] for row in found["by_day"]] == [0, 1, 2, 3] and (tmp_path / "d.png").exists()
    assert "sample ratio: users {'production': " in done.stdout and "| random | visits |" in done.stdout
    done = launch.ok("ab_test", *TINY, "--arms=production", "--aa=20", "--sessions=300", f"--out={tmp_path / 'a.json'}")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["tests"] == 20 and 0.5 < found["aa"]["depth"]["coverage"] <= 1 and "20 A/A tests" in done.stdout
