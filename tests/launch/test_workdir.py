"""A folder is claimed and given up again without touching what was there before."""

import pytest

from mmrf_jax.training import workdir as wd


def test_release_removes_what_claim_made_and_no_more(tmp_path):
    run = tmp_path / "a" / "b" / "run"
    made = wd.claim(run, {"seed": 0})
    assert made == [tmp_path / "a", tmp_path / "a" / "b", run]
    wd.release(run, made)
    assert not (tmp_path / "a").exists()

    run.mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    made = wd.claim(run, {"seed": 0})
    assert made == []
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    wd.release(run, made)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


def test_release_leaves_a_run_with_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    made = wd.claim(run, {"seed": 0})
    (run / "checkpoints" / "4").mkdir(parents=True)
    wd.release(run, made)
    assert (run / "checkpoints" / "4").is_dir() and (run / "config.json").exists()
    assert wd.claim(run, {"seed": 0}) is None


def test_a_folder_made_before_a_field_belongs_to_configs_that_leave_it_none(tmp_path):
    wd.claim(tmp_path / "run", {"seed": 1, "agents": {"dim": 8}})
    assert wd.claim(tmp_path / "run", {"seed": 1, "agents": {"dim": 8, "max_rows": None}}) is None
    with pytest.raises(ValueError, match=r"config.agents.max_rows was None, now 100"):
        wd.claim(tmp_path / "run", {"seed": 1, "agents": {"dim": 8, "max_rows": 100}})
