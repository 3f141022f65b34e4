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
        ((*TINY, "--config.nosuch=1"), 1, ("nosuch",)),
        ((*TINY, "--config.method=nosuch"), 1, ("'nosuch'", "mmrf", "--config.method")),
        ((*TINY, "--config.ab_test.arms=('production','nosuch')"), 1, ("'nosuch'", "config.ab_test.arms", "random")),
        ((*TINY, "--config.train.batch=30"), 4, ("30", "4 devices", "--config.train.batch=32")),
    ],
    ids=["no-data-dir", "missing-column", "no-log", "unknown-field", "unknown-method", "unknown-arm", "batch"],
)
def test_train_refuses_in_one_line_and_writes_nothing(args, devices, parts, launch, tmp_path):
    broken_csv(tmp_path / "broken")
    args = [arg.replace("{tmp}", str(tmp_path)) for arg in args]
    done = launch("train", *args, f"--workdir={tmp_path / 'run'}", devices=devices)
    error_line(done, *parts)
    assert not (tmp_path / "run").exists(), list((tmp_path / "run").rglob("*"))


def test_a_workdir_that_is_a_file_is_refused(launch, tmp_path):
    (tmp_path / "run").write_text("mine")
    error_line(launch("train", *TINY, f"--workdir={tmp_path / 'run'}"), "run", "is a file", "folder")
    assert (tmp_path / "run").read_text() == "mine"


def flip_a_byte(step_dir):
    """In the middle of the largest file of a checkpoint."""
    path = max((p for p in step_dir.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_checkpoints(finished, launch, tmp_path):
    """The newest damaged: the one before serves and the end is the same. All damaged: one line."""
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "results.json").unlink()
    all_damaged = shutil.copytree(run, tmp_path / "all_damaged")
    newest, before = steps(run)[-1], steps(run)[-2]
    flip_a_byte(run / "checkpoints" / str(newest))
    done = launch.ok("train", *TINY, f"--workdir={run}")
    assert f"checkpoint {newest}" in done.stderr and f"falling back to step {before}" in done.stderr
    assert results(run) == results(finished)

    for step in steps(all_damaged):
        flip_a_byte(all_damaged / "checkpoints" / str(step))
    done = launch("train", *TINY, f"--workdir={all_damaged}")
    error_line(done, "no usable checkpoint", str(newest), str(before), "afresh")
    assert not (all_damaged / "results.json").exists()
