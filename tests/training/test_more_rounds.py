"""More rounds of a finished run: one and one are two, but for the learning rates, which decay over all rounds."""

import pytest
import tiny
from processes import rows

from mmrf_jax import configs as packaged
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import configs, inputs, restore, run_folder, steps, train

TINY = {
    "quick": True,
    "world": {"num_videos": 1_000, "candidates": 20},
    "collect": {"sessions": 200, "test_sessions": 200},
    "ab_test": {"sessions": 64, "arms": ("production",)},
    "train": {"batch": 32},
    "feedback": {"batch": 32},
    "log_every": 2,
}


def config(rounds: int) -> configs.Run:
    values = packaged.load("world").to_dict()
    return configs.run_of(configs.resolve_config(values, {**TINY, "alternation": {"rounds": rounds}}))


def state(folder):
    found = configs.run_of(run_folder.read_config(folder))
    return restore.load_state(found, inputs.read_inputs(folder), folder, Partitioner())


@pytest.mark.slow
def test_one_and_one_rounds_are_two_at_a_constant_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "lr_scale_at", lambda progress: 1.0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = train.train_run(config(2), whole, brief=True)
    assert train.train_run(config(1), parts, brief=True)["train"]["rounds"] == 1
    assert train.train_run(config(2), parts, brief=True) == wanted and wanted["train"]["rounds"] == 2
    assert run_folder.read_config(parts) == run_folder.read_config(whole)
    assert not tiny.differences(state(whole), state(parts)) and rows(parts) == rows(whole)
    assert train.train_run(config(2), parts, brief=True) == wanted  # finished
