"""Seeds side by side: each is the run that its seed makes alone, also if it is killed, and on several devices."""

import json
import shutil
import signal
import types

import jax
import numpy as np
import pytest
import tiny
from processes import rows

import mmrf_jax
from mmrf_jax import configs as packaged
from mmrf_jax.io import trackers
from mmrf_jax.parallel import preemption, programs
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import configs, inputs, restore, rounds, run_folder, side_by_side, train

TINY = {
    "quick": True,
    "world": {"num_videos": 1_000, "candidates": 20},
    "collect": {"sessions": 100, "test_sessions": 100},
    "agents": {"signals": ("click", "watch_time")},
    "feedback": {"batch": 16},
    "train": {"batch": 16},
    "ab_test": {"sessions": 64, "arms": ("production",)},
    "log_every": 2,
    "checkpoint_every": 5,
}


NAMES = ("seed2", "seed3")  # of whose first logs the second has fewer batches


def config(seed=2, **overrides) -> configs.Run:
    return configs.run_of(configs.resolve_config(packaged.load("world").to_dict(), TINY | overrides | {"seed": seed}))


def state(folder):
    found = configs.run_of(run_folder.read_config(folder))
    return restore.load_state(found, inputs.read_inputs(folder), folder, Partitioner())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs of two seeds, one after the other; only rank."""
    folder = tmp_path_factory.mktemp("alone")
    for seed, name in enumerate(NAMES, 2):
        train.train_run(config(seed), folder / name, brief=True)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The runs of two seeds side by side."""
    folder = tmp_path_factory.mktemp("together")
    train.train_runs(side_by_side.runs_of(config(seeds=2), folder), brief=True)
    return folder


def agree(one, other):
    """Refuse two runs of a seed that differ by more than rounding: contract of a closed loop."""
    assert run_folder.read_config(one) == run_folder.read_config(other)
    assert (one / "checkpoints").is_dir() and checkpoints(one) == checkpoints(other)
    for mine, others in zip(rows(one), rows(other), strict=True):
        assert [mine.pop(name) for name in ("step", "seed", "phase")] == [
            others.pop(n) for n in ("step", "seed", "phase")
        ]
        assert mine == pytest.approx(others, rel=1e-3, abs=1e-4)
    mine, others = (run_folder.read_json(folder / "results.json") for folder in (one, other))
    assert mine["train"]["sessions_of_last_round"] == others["train"]["sessions_of_last_round"]
    assert mine["train"]["updates"] == others["train"]["updates"]
    for metric, found in mine["ab_test"]["mmrf"].items():
        if found["ci95"] is not None:
            low, high = found["ci95"]
            assert abs(found["diff_pct"] - others["ab_test"]["mmrf"][metric]["diff_pct"]) <= (high - low) / 2, metric


def checkpoints(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.mark.slow
def test_each_is_the_run_of_its_seed_alone(alone, together):
    steps = [[row["step"] for row in rows(together / name)] for name in NAMES]
    assert steps[0] != steps[1]  # one ends phases before the other
    for name in NAMES:
        agree(alone / name, together / name)
        assert max(tiny.differences(state(alone / name), state(together / name)).values()) < 1e-4
        ranked = [mmrf_jax.load(folder / name).rank(candidates=list(range(9)), k=3) for folder in (alone, together)]
        assert ranked[0] == ranked[1]
    assert not (together / "config.json").exists()


@pytest.mark.slow
def test_a_killed_run_of_two_seeds_ends_as_if_nothing_had_happened(together, tmp_path, monkeypatch):
    """Twice, with the seeds at different steps afterwards: in one phase, and in different rounds."""
    step, runs, left = side_by_side.Seeds.step, side_by_side.runs_of(config(seeds=2), tmp_path), []

    def taken(*args):
        left[0] -= 1
        if left[0] < 0:
            raise preemption.Preempted(signal.SIGTERM)
        return step(*args)

    def lose(seed, after):
        for number in checkpoints(tmp_path / seed):
            if number > after:
                shutil.rmtree(tmp_path / seed / "checkpoints" / str(number))

    monkeypatch.setattr(side_by_side.Seeds, "step", taken)
    left[:] = [12]
    with pytest.raises(preemption.Preempted):
        train.train_runs(runs, brief=True)
    assert [checkpoints(run)[-1] for run in runs] == [12, 11]
    lose("seed3", after=10)
    left[:] = [8]  # of which six are those that both have left of the round
    with pytest.raises(preemption.Preempted):
        train.train_runs(runs, brief=True)
    assert [checkpoints(run)[-1] for run in runs] == [20, 18]
    lose("seed2", after=15)
    left[:] = [1_000]
    train.train_runs(runs, brief=True)
    for name in NAMES:
        assert rows(tmp_path / name) == rows(together / name)
        found = [(folder / name / "results.json").read_bytes() for folder in (tmp_path, together)]
        assert found[0] == found[1] and not tiny.differences(state(tmp_path / name), state(together / name))
    left[:] = [0]  # no step is taken of finished runs
    assert train.train_runs(runs, brief=True).keys() == runs.keys()


TWO_DEVICES = """
import collections, json, sys
from pathlib import Path
import jax
from mmrf_jax.training import configs, side_by_side, steps, train

config, folder = configs.run_of(json.loads(sys.argv[1])), Path(sys.argv[2])
step, split, traced = side_by_side.Seeds.step, [], collections.Counter()

def taken(seeds, program, states, *args):
    rows = states.feedback.params["heads"]["params"]["hidden"]["kernel"]
    split.append([shard.data.shape[0] for shard in rows.addressable_shards])
    return step(seeds, program, states, *args)

def counted(name, function):
    def call(*args):
        traced[name] += 1
        return function(*args)
    return call

for name in ("fit_step", "update_step"):
    program = getattr(steps, name)
    program._function = counted(name, program._function)
side_by_side.Seeds.step = taken
train.train_runs(side_by_side.runs_of(config, folder), brief=True)
assert jax.device_count() == 2 and split and all(shards == [1, 1] for shards in split), split
assert traced == {"fit_step": 1, "update_step": 1}, traced
print("all well")
"""


@pytest.mark.slow
def test_two_seeds_on_two_devices_are_two_runs(alone, run_python, tmp_path):
    given = json.dumps(configs.as_dict(config(seeds=2)))
    assert "all well" in run_python(TWO_DEVICES, given, tmp_path, devices=2)
    for name in NAMES:
        agree(alone / name, tmp_path / name)


@pytest.fixture
def seeds():
    """Three runs whose state is {"x": [2]}."""
    partitioner = Partitioner()
    shapes = {"x": jax.ShapeDtypeStruct((2,), np.float32, sharding=partitioner.replicated_sharding)}
    return side_by_side.Seeds(3, shapes, partitioner)


def test_a_step_is_of_each_run_with_its_own_state_batch_and_rate(seeds):
    def step(state, batch, items, plan, lr_scale, more):
        return {"x": state["x"] * items[plan] + lr_scale * batch}, {"sum": batch.sum() + more}

    program = programs.Program(step, calls="few", static_argnames="plan")
    x, batch = np.arange(6, dtype=np.float32).reshape(3, 2), 10.0 ** np.arange(6, dtype=np.float32).reshape(3, 2)
    lr_scale, items, more = np.float32([1, 2, 4]), np.float32([7, 100]), np.float32([0.5, 0.25, 0])
    states, more = seeds.join({i: {"x": x[i]} for i in range(3)}), seeds.join(dict(enumerate(more)))
    given = {i: (batch[i], lr_scale[i]) for i in (1, 2)}  # the first has ended: the next one's stand for its inputs
    states, metrics = seeds.step(program, states, given, items, 1, more)
    for i in (1, 2):
        np.testing.assert_array_equal(seeds.take(states, i)["x"], 100 * x[i] + lr_scale[i] * batch[i])
        assert seeds.metrics_of(metrics, i)["sum"] == batch[i].sum() + (0.5, 0.25, 0)[i]
    np.testing.assert_array_equal(seeds.take(states, 0)["x"], 100 * x[0] + lr_scale[1] * batch[1])


def test_the_runs_of_a_config(tmp_path):
    run = config(seeds=2, seed=3)
    runs = side_by_side.runs_of(run, tmp_path)
    assert runs == {tmp_path / f"seed{seed}": config(seed=seed) for seed in (3, 4)}
    assert side_by_side.runs_of(config(), tmp_path) == {tmp_path: config()}
    with pytest.raises(ValueError, match=r"config\.seeds=2 makes several runs, and this trains one; use mmrf train"):
        train.train_run(run, tmp_path)
    (tmp_path / "seed3").mkdir()
    (tmp_path / "seed3" / "config.json").touch()
    with pytest.raises(ValueError, match=r"no config.json; name one of the seeds in it, such as .*/seed3$"):
        run_folder.read_config(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=f"{tmp_path} is a run folder, and config.seeds=2 makes one for each seed in"):
        side_by_side.runs_of(run, tmp_path)


def test_what_cannot_be_side_by_side_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    def refused(message, **overrides):
        runs = side_by_side.runs_of(config(seeds=3, **overrides), tmp_path / "runs")
        with pytest.raises(ValueError, match=message):
            train.train_runs(runs)
        assert not (tmp_path / "runs").exists()

    monkeypatch.setattr(trackers, "check_trackers", lambda names: None)  # wandb need not be installed
    refused(
        "config.trackers has 'wandb', which tracks one run at a time, but config.seeds=3", trackers=("csv", "wandb")
    )
    monkeypatch.setattr(Partitioner, "num_devices", property(lambda self: 2))
    refused("seeds 3 is not divisible by 2 devices; use --config.seeds=4")
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    refused("config.seeds=3, but seeds are trained side by side in one process, and these are 4; start one process")


def test_random_slates_are_not_measured_on_the_devices():
    feedback = types.SimpleNamespace(exposures=2)
    agents = types.SimpleNamespace(discount=0.9)
    plan = types.SimpleNamespace(agents=agents, feedback=feedback, use_feedback_model=True)
    source = types.SimpleNamespace(blocks=lambda: None, valid=None)
    job = types.SimpleNamespace(config=config(train={"log_on_device": True}), plan=plan, source=source, name="")
    with pytest.raises(ValueError, match=r"log_on_device=True, but .*; use --config\.train\.log_on_device=False"):
        rounds._first_log(job)


def test_a_streamed_log_is_refused():
    source = types.SimpleNamespace(blocks=lambda: "blocks")
    plan = types.SimpleNamespace(agents=types.SimpleNamespace(discount=0.9))
    job = types.SimpleNamespace(config=config(), plan=plan, source=source, name="seed 1")
    with pytest.raises(ValueError, match=r"the log is streamed; use --config\.seeds=1, or --config.data.stream=False"):
        rounds._first_log(job)
