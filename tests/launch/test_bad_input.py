"""What a user gets wrong is said in one line that names the thing, the value and the fix; nothing is left behind."""

import shutil

import pytest
from processes import TINY, error_line, results, steps

KUAIRAND = ("--config=experiments/kuairand.py", "--config.quick=True")


def broken_csv(folder):
    """A KuaiRand folder whose standard log lacks a column."""
    data = folder / "data"
    data.mkdir(parents=True)
    (data / "log_standard_4_22_to_5_08_pure.csv").write_text("user_id,video_id,date\n1,2,20220501\n")
    (data / "log_random_4_22_to_5_08_pure.csv").write_text("user_id,video_id,date\n1,2,20220501\n")
    (data / "user_features_pure.csv").write_text("user_id\n1\n")
    (data / "video_features_basic_pure.csv").write_text("video_id\n2\n")
    (data / "video_features_statistic_pure.csv").write_text("video_id\n2\n")


@pytest.mark.parametrize(
    ("args", "devices", "parts"),
    [
        ((*KUAIRAND, "--config.data.dir={tmp}/none", "--config.data.cache_dir={tmp}/cache"), 1, ("none",)),
        ((*KUAIRAND, "--config.data.dir={tmp}/broken", "--config.data.cache_dir={tmp}/cache"), 1, ("column", ".csv")),
        ((*TINY, "--config.data.dir={tmp}/nolog"), 1, ("nolog", "does not exist", "collect")),
        (("--config={tmp}/none.py",), 1, ("none.py", "cannot be read", "world")),
        (("--config={tmp}/bad.py",), 1, ("bad.py", "no Python file", "line 1")),
        ((*TINY, "--config.nosuch=1"), 1, ("unknown config field 'nosuch'",)),
        ((*TINY, "--config.method=nosuch"), 1, ("unknown method 'nosuch'", "mmrf", "--import=MODULE")),
        ((*TINY, "--config.ab_test.arms=('production','nosuch')"), 1, ("'nosuch'", "config.ab_test.arms", "random")),
        ((*TINY, "--config.source=nosuch"), 1, ("'nosuch'", "kuairand")),
        ((*TINY, "--config.log_every=0"), 1, ("log_every", "0", "--config.log_every=1")),
        ((*TINY, "--config.profile_steps=9"), 1, ("profile_steps", "9", "100:110")),
        ((*TINY, "--config.seed=-1"), 1, ("seed", "-1", "--config.seed=0")),
        ((*TINY, "--config.world.slate=0"), 1, ("world.slate is 0", "1 or more")),
        ((*TINY, "--config.simulator=nosuch"), 1, ("simulator", "'nosuch'", "feedback")),
        ((*TINY, "--config.simulator=feedback"), 1, ("--config.simulator_checkpoint=RUN",)),
        ((*TINY, "--config.feedback.log_fraction=0.0"), 1, ("feedback.log_fraction", "0.0", "(0, 1]")),
        ((*TINY, "--config.agents.ablation=nosuch"), 1, ("'nosuch'", "none, no_collaboration")),
        ((*TINY, "--config.train.batch=30"), 4, ("30", "4 devices", "--config.train.batch=32")),
    ],
    ids=[
        "no-data-dir",
        "missing-column",
        "no-log",
        "no-config-file",
        "bad-config-file",
        "unknown-field",
        "unknown-method",
        "unknown-arm",
        "unknown-source",
        "log-every",
        "profile",
        "seed",
        "slate",
        "simulator",
        "no-model",
        "share",
        "ablation",
        "batch",
    ],
)
def test_train_refuses_in_one_line_and_writes_nothing(args, devices, parts, launch, tmp_path):
    broken_csv(tmp_path / "broken")
    (tmp_path / "bad.py").write_text("def get_config(:\n")
    args = [arg.replace("{tmp}", str(tmp_path)) for arg in args]
    done = launch("train", *args, f"--workdir={tmp_path / 'run'}", devices=devices)
    error_line(done, *parts)
    assert not (tmp_path / "run").exists(), list((tmp_path / "run").rglob("*"))


def test_a_workdir_that_is_a_file_is_refused(launch, tmp_path):
    (tmp_path / "run").write_text("mine")
    error_line(launch("train", *TINY, f"--workdir={tmp_path / 'run'}"), "run", "is a file", "folder")
    assert (tmp_path / "run").read_text() == "mine"


def damage(step_dir, how):
    """The largest file of a checkpoint."""
    path = max((p for p in step_dir.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["flipped", *(pytest.param(how, marks=pytest.mark.nightly) for how in ("truncated", "missing"))]
)
def test_a_damaged_checkpoint(how, finished, launch, tmp_path):
    """The one before serves, and the end is the same."""
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "results.json").unlink()
    newest, before = steps(run)[-1], steps(run)[-2]
    damage(run / "checkpoints" / str(newest), how)
    done = launch.ok("train", *TINY, f"--workdir={run}")
    assert f"checkpoint {newest}" in done.stderr and f"falling back to step {before}" in done.stderr
    assert results(run) == results(finished)


def test_no_checkpoint_is_left_undamaged(finished, launch, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "results.json").unlink()
    for step in steps(run):
        damage(run / "checkpoints" / str(step), "flipped")
    for main, args in (("train", TINY), ("evaluate", ())):
        error_line(launch(main, *args, f"--workdir={run}"), "no usable checkpoint", *map(str, steps(run)), "afresh")
    assert not (run / "results.json").exists() and not (run / "evaluation.json").exists()


@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_damaged_file_of_a_run(name, finished, launch, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / name).write_text((run / name).read_text()[:40])
    error_line(launch("train", *TINY, f"--workdir={run}"), name, "is damaged")


#: Rates at which the state is infinite after one update, while the loss of that update is still finite.
INFINITE = ("--config.feedback.learning_rate=1e39",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("--config.checkpoint_every=100",), ("steps 1 to 2", "not finite at step 2", "loss/", "learning rate")),
        (("--config.checkpoint_every=1",), ("steps 1 to 1", "state after step 1 is not finite", "not saved")),
    ],
    ids=["loss", "state"],
)
def test_what_is_not_finite_stops_the_run_and_is_not_saved(args, parts, launch, tmp_path):
    """An empty folder that was there before is still there, and empty; the corrected command may have it."""
    run = tmp_path / "run"
    run.mkdir()
    error_line(launch("train", *TINY, *INFINITE, *args, f"--workdir={run}"), *parts)
    assert run.is_dir() and not list(run.iterdir())


def test_a_run_that_has_a_checkpoint_keeps_its_folder_when_it_fails(finished, launch, tmp_path):
    """It is not this start that made the folder."""
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "results.json").unlink()
    (run / "learned.json").write_text("{")
    error_line(launch("train", *TINY, f"--workdir={run}"), "learned.json", "is damaged")
    assert (run / "config.json").exists() and steps(run) == steps(finished)


def test_outputs_that_cannot_be_written_are_refused_before_any_work(launch, tmp_path):
    (tmp_path / "file").write_text("")
    for main, args in (("collect", ()), ("ab_test", ("--arms=production",))):
        done = launch(main, *TINY, *args, "--sessions=64", f"--out={tmp_path / 'file' / 'x'}")
        error_line(done, "--out=", "cannot be written", str(tmp_path / "file"))
