"""`launch.synthesize` writes what `launch.prepare` reads, and that writes records."""

import os
import re
import subprocess

import pytest
from processes import ROOT, error_line

from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.data.readers.kuairand import builder

KUAIRAND = ("--config=experiments/kuairand.py", "--config.quick=True", "--config.data.candidates=20")


def test_a_synthetic_log_is_prepared(launch, tmp_path):
    source, out = tmp_path / "log", tmp_path / "records"
    sizes = ("--rows=30000", "--users=400", "--videos=1500", "--variant=pure")
    done = launch.ok("synthesize", *sizes, f"--out={source}")
    assert done.stdout == f"30,000 rows -> {source}\n"
    error_line(launch("synthesize", *sizes, f"--out={source}"), str(source), "exists", "name a folder that does not")
    error_line(launch("synthesize", "--rows=0", f"--out={tmp_path / 'o'}"), "rows", "0")

    done = launch.ok("prepare", *KUAIRAND, f"--source={source}", f"--out={out}", "--workers=2")
    rows = 30_000 + 24_765
    assert done.stdout.startswith(f"{rows:,} rows -> {out}\n")
    assert re.search(r"s, [\d,]+ rows/s; peak memory \d\.\d\d GiB", done.stdout)
    log = builder.KuaiRand.open(out)
    counts = log.report["splits"]
    assert log.part("train").num_requests == counts["train"]["requests"] > 500
    assert f"train: {counts['train']['users']:,} users" in done.stdout

    # a second start has nothing to do; training with other settings is refused
    assert "rows/s" not in launch.ok("prepare", *KUAIRAND, f"--source={source}", f"--out={out}").stdout
    other = launch("train", *KUAIRAND, f"--config.data.dir={out}", "--config.data.slate=3", f"--workdir={tmp_path}/run")
    error_line(other, "was prepared with other settings")


@pytest.mark.slow
def test_it_works_in_any_folder_and_with_any_path(launch, tmp_path):
    """The config is found from the package; paths are expanded and otherwise taken literally."""
    environment = launch.environment() | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}

    def run(name, *args):
        command = launch.command(name, *args)
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]

    run("synthesize", "--rows=2000", "--out=~/log [a]*")
    run("prepare", "--source=~/log [a]*", "--out=x[3] 'é\"/records")
    assert builder.KuaiRand.open(tmp_path / "x[3] 'é\"" / "records").report["log"]["standard"]["rows"] == 2_000
    assert sorted(os.listdir(tmp_path)) == ["log [a]*", "x[3] 'é\""]


def test_what_cannot_be_prepared_is_said_in_a_line(launch, tmp_path):
    where = (f"--source={tmp_path / 'nowhere'}", f"--out={tmp_path / 'out'}")
    error_line(launch("prepare", *where), "nowhere does not exist", "name the folder")
    error_line(launch("prepare", *where, "--workers=0"), "workers", "0")
    error_line(launch("prepare", *where, "--config.data.slate=0"), "data.slate is 0; use --config.data.slate=1")


def test_own_tables_are_prepared(launch, tmp_path):
    """What `launch.synthesize` writes as tables; training names the folder, and a second start has nothing to do."""
    done = launch.ok("synthesize", "--rows=5000", "--layout=tables", f"--out={tmp_path / 'log'}")
    data = {"path": "log", "schema": "schema.py", "item_table": "items", "user_table": "users"}
    args = ["--config=logs", *(f"--config.data.{key}={tmp_path / 'log' / name}" for key, name in data.items())]
    done = launch.ok("prepare", *args, f"--out={tmp_path / 'records'}")
    assert done.stdout.startswith(f"5,000 rows -> {tmp_path / 'records'}\n") and "rows/s; peak memory" in done.stdout
    log = SessionLog.open(tmp_path / "records")
    assert f"train: {log.report['splits']['train']['users']:,} users" in done.stdout
    assert log.spec.candidates == 100 and log.train.num_requests == log.report["splits"]["train"]["requests"] > 500
    assert "rows/s" not in launch.ok("prepare", *args, f"--out={tmp_path / 'records'}").stdout
    error_line(launch("prepare", "--config=world", f"--out={tmp_path / 'x'}"), "config.source is 'world'")
    error_line(launch("prepare", f"--out={tmp_path / 'x'}"), "use --source=DIR")
