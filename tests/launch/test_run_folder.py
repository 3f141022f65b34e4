"""Two processes, one folder; and a folder is claimed and given up again without touching what was there before."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import TINY, results

import mmrf_jax as mmrf
from mmrf_jax.io import files
from mmrf_jax.parallel import preemption
from mmrf_jax.training import configs, inputs, restore, run_folder, train

ROOT = Path(__file__).resolve().parents[2]
HOLDER = "import sys, time\nfrom pathlib import Path\nfrom mmrf_jax.io import files\n"


class Failed(Exception):
    pass


def holding(folder: Path) -> subprocess.Popen:
    """A process that holds a folder."""
    script = f"{HOLDER}with files.held(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(900)"
    process = subprocess.Popen([sys.executable, "-c", script, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def fail(run: Path, config: dict, error: BaseException, *made: str) -> None:
    """A start that makes some files in its folder, and then ends by an error."""
    with pytest.raises(type(error)), run_folder.claimed_workdir(run, config):
        for name in made:
            (run / name).mkdir(parents=True)
        raise error


@pytest.mark.parametrize(
    "error", [Failed(), ValueError(), KeyboardInterrupt(), SystemExit(1), preemption.Preempted(signal.SIGINT)]
)
def test_a_folder_is_given_up_whatever_ended_the_start(error, tmp_path):
    """What the start made goes, and no more."""
    fail(tmp_path / "a" / "b" / "run", {"seed": 0}, error, "tensorboard", "checkpoints/4.orbax-checkpoint-tmp")
    assert not (tmp_path / "a").exists()
    run = tmp_path / "run"
    run.mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    fail(run, {"seed": 0}, error, "profile", "checkpoints/4.orbax-checkpoint-tmp")
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


def test_a_folder_is_taken_over_from_a_start_that_was_killed_before_its_first_checkpoint(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"seed": 0}))
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "notes.txt").write_text("mine")
    with run_folder.claimed_workdir(run, {"seed": 1}):
        assert run_folder.read_config(run) == {"seed": 1}
        assert sorted(path.name for path in run.iterdir()) == ["config.json", "lock", "notes.txt"]


@pytest.mark.parametrize("learned", ["checkpoints/4", "learned.json", "results.json"])
def test_a_run_with_something_to_lose_keeps_its_folder(learned, tmp_path):
    run = tmp_path / "run"
    fail(run, {"seed": 0}, Failed(), learned)
    assert (run / learned).exists() and (run / "config.json").exists()
    with run_folder.claimed_workdir(run, {"seed": 0}):
        pass
    with pytest.raises(ValueError, match=r"config.seed was 0, now 1"), run_folder.claimed_workdir(run, {"seed": 1}):
        pass
    assert sorted(path.name for path in run.iterdir()) == sorted(["config.json", learned.split("/")[0]])


def test_what_has_no_config_is_not_taken(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with (
        pytest.raises(ValueError, match=r"holds results.json but no config.json"),
        run_folder.claimed_workdir(tmp_path, {"seed": 1}),
    ):
        pass
    assert (tmp_path / "results.json").exists()


def test_a_folder_made_before_a_field_belongs_to_configs_that_leave_it_none(tmp_path):
    run = tmp_path / "run"
    fail(run, {"seed": 1, "agents": {"dim": 8}}, Failed(), "checkpoints/4")
    with run_folder.claimed_workdir(run, {"seed": 1, "agents": {"dim": 8, "max_rows": None}}):
        pass
    more = {"seed": 1, "agents": {"dim": 8, "max_rows": 100}}
    with (
        pytest.raises(ValueError, match=r"config.agents.max_rows was None, now 100"),
        run_folder.claimed_workdir(run, more),
    ):
        pass


def test_two_processes_one_folder(tmp_path):
    """The second is refused by the holder's name, whatever it wants there; a kill frees the folder."""
    process = holding(tmp_path)
    config = configs.Run()
    named = rf"used by another process: process {process.pid} on {socket.gethostname()}, since \d{{4}}-"
    with pytest.raises(ValueError, match=named):
        train.train_run(config, tmp_path)
    with pytest.raises(ValueError, match=named), files.held(tmp_path, patience=0.2):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    with files.held(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_file_that_is_gone_is_none(tmp_path, monkeypatch):
    """A process that opened the lock before its holder removed it must not think that it has the folder."""
    real, opened = Path.open, []

    def removed(self, *args, **kwargs):
        file = real(self, *args, **kwargs)
        if not opened:
            self.unlink()
        opened.append(self)
        return file

    monkeypatch.setattr(Path, "open", removed)
    with files.held(tmp_path):
        assert len(opened) == 2 and (tmp_path / "lock").exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with files.held(tmp_path):
        pass
    assert "cannot be locked (Operation not supported)" in capsys.readouterr().err


def test_a_run_ranks_and_is_exported_without_its_source(finished, artifact, monkeypatch, tmp_path):
    """What the world made is in the folder; its artefact, exported from it, ranks alike."""
    monkeypatch.setattr(restore, "source_of", lambda *_: pytest.fail("the source is built again"))
    kept = inputs.read_inputs(finished)
    assert kept.code == mmrf.__version__ and kept.video_ids is None
    assert kept.spec.num_videos == kept.items.num_videos == 1_000 and kept.spec.candidates == 20
    run, exported = mmrf.load(finished), mmrf.load(artifact)
    request = {"candidates": [3, 1, 4, 15, 9, 26], "history": [(5, {"click": 1.0, "watch_time": 20.0})], "k": 4}
    assert run.rank(**request) == exported.rank(**request) and len(run.rank(**request)) == 4
    assert exported.config == run.config and exported.results == run.results and run.results["ab_test"]
    again = run.export(tmp_path / "again")
    assert json.loads((again.path / "manifest.json").read_text())["code"] == mmrf.__version__


@pytest.mark.slow
def test_from_python_a_run_has_the_results_of_the_command(finished, run_python, tmp_path):
    """Whatever the calling program computes with: to the bit."""
    fields = {name: value for name, _, value in (flag.removeprefix("--config.").partition("=") for flag in TINY[1:])}
    script = """
import ast, json, sys
import jax
import mmrf_jax as mmrf

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_default_prng_impl", "rbg")
run = mmrf.train("world", sys.argv[1], {name: ast.literal_eval(x) for name, x in json.loads(sys.argv[2]).items()})
assert jax.config.jax_enable_x64 and jax.config.jax_default_prng_impl == "rbg"
print(json.dumps(run.results))
"""
    said = run_python(script, tmp_path / "run", json.dumps(fields))
    assert json.loads(said.splitlines()[-1]) == results(finished)
