"""A method and a policy of another module, from training to serving."""

import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from processes import ONE_ROUND, TINY, error_line, results

from mmrf_jax.cli import serving

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "examples.own_method"
ARGS = (f"--import={PLUGIN}", *TINY, "--config.method=calm", "--config.ab_test.arms=('production','popular')")


def test_an_unknown_method_and_an_unknown_module_are_one_line(launch, tmp_path):
    done = launch("train", *TINY, "--config.method=clam", f"--workdir={tmp_path / 'run'}")
    error_line(done, "unknown method 'clam'", "mmrf", "--import=MODULE")
    done = launch("train", "--import=own_methd", *TINY, f"--workdir={tmp_path / 'run'}")
    error_line(done, "--import=own_methd", "no module 'own_methd'")
    done = launch("train", f"--import={PLUGIN}", *TINY, "--config.method=clam", f"--workdir={tmp_path / 'run'}")
    error_line(done, "did you mean calm")
    done = launch("train", *TINY, "--config.ab_test.arms=('popular',)", f"--workdir={tmp_path / 'run'}")
    error_line(done, "unknown arm 'popular'", "oracle_myopic")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_without_its_plug_in_names_the_module_and_the_flag(launch, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"method": "lost", "plugins": ["lost_module"]}))
    for name, *more in (("report",), ("evaluate",), ("export", f"--out={tmp_path / 'artefact'}")):
        done = launch(name, f"--workdir={run}", *more)
        error_line(done, "unknown method 'lost'", "module 'lost_module'", "--import=MODULE")
    done = launch("ab_test", *TINY, f"--arms=production,{run}", f"--out={tmp_path / 'ab.json'}")
    error_line(done, "unknown method 'lost'", "module 'lost_module'")
    assert not (tmp_path / "artefact").exists()


@pytest.mark.slow
def test_from_training_to_serving(launch, tmp_path):
    run, artefact = tmp_path / "run", tmp_path / "artefact"
    launch.ok("train", *ARGS, *ONE_ROUND, f"--workdir={run}")
    assert set(results(run)["ab_test"]) == {"calm", "production", "popular"}
    assert json.loads((run / "config.json").read_text())["plugins"] == [PLUGIN]
    assert '"loss/size"' in (run / "metrics.jsonl").read_text()
    assert "calm" in (run / "report.html").read_text()
    # From here on the run's config names the module.
    launch.ok("evaluate", f"--workdir={run}")
    assert json.loads((run / "evaluation.json").read_text())["offline"] == results(run)["offline"]
    (run / "report.html").unlink()
    launch.ok("report", f"--workdir={run}")
    assert (run / "report.html").exists()
    out = tmp_path / "ab.json"
    launch.ok(
        *("ab_test", f"--import={PLUGIN}", *TINY, f"--arms=production,popular,{run}", "--sessions=64", f"--out={out}")
    )
    compared = json.loads(out.read_text())["ab_test"]
    assert set(compared) == {"production", "popular", "calm"}
    # The same policy, users and randomness in both tests.
    assert compared["popular"]["watch_time"]["mean"] == results(run)["ab_test"]["popular"]["watch_time"]["mean"]
    launch.ok("export", f"--workdir={run}", f"--out={artefact}")
    script = (
        "import sys, mmrf_jax as mmrf\n"
        f"print(mmrf.load({str(artefact)!r}).rank([7, 42, 99, 512]))\n"
        f"assert {PLUGIN!r} not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and sorted(json.loads(done.stdout)) == [7, 42, 99, 512], done.stderr
    with serving.service(artefact, tmp_path / "log", tmp_path / "serve.log") as server:
        context = json.loads((artefact / "manifest.json").read_text())["spec"]["context"] - 1
        asked = {"user": {"id": 1}, "context": [0.0] * context, "candidates": [7, 42, 99, 512], "k": 2}
        body = json.dumps(asked).encode()
        request = urllib.request.Request(f"{server.url}/rank", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert len(json.load(answer)["slate"]) == 2
