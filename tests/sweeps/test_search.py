"""`sweeps.search` with a stub in place of training: resume after a kill, shared trials, ASHA, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import search as example
from mmrf_jax.io import extras, files
from mmrf_jax.training import configs

optuna = pytest.importorskip("optuna")
from mmrf_jax.sweeps import search  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def make_config(**changes):
    config = example.get_config()
    config.update({"trials": 6, "sampler": "random", "pruner": "none"})
    config.update_from_flattened_dict(changes)
    return config


def rate(config: configs.Run, folder: Path) -> float:
    """The stub: the learning rate, times the rounds."""
    return config.agents.learning_rate * config.alternation.rounds


def params(trials):
    return [trial["params"] for trial in trials]


def test_every_trial_is_a_run_of_its_parameters(tmp_path):
    seen = {}

    def measure(config, folder):
        seen[folder.name] = config
        return config.agents.learning_rate

    trials = search.run_search(make_config(), tmp_path, measure)
    assert [trial["run"] for trial in trials] == [f"runs/{n:03d}" for n in range(6)]
    for trial in trials:
        run, given = seen[f"{trial['number']:03d}"], trial["params"]
        assert (
            trial["state"] == "finished" and trial["value"] == given["agents.learning_rate"] == run.agents.learning_rate
        )
        assert run.agents.polyak == given["agents.polyak"] and 0.01 <= run.agents.polyak <= 0.1
        assert run.agents.counterfactual_weight in (0.0, 0.1, 0.25, 0.5)
        assert run.seed == 0 and run.world is not None and run.world.seed == 1 and run.alternation.rounds == 3
    assert len({trial["value"] for trial in trials}) == 6
    assert json.loads((tmp_path / "trials.json").read_text())["trials"] == trials
    rows = (tmp_path / "table.md").read_text().splitlines()
    best = max(trials, key=lambda trial: trial["value"])
    assert rows[0].startswith("6 of 6 trials: 6 finished, 0 pruned") and rows[4].startswith(f"| {best['number']} |")


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_finished_search_has_nothing_to_do_and_more_trials_continue_it(sampler, tmp_path):
    first = search.run_search(make_config(sampler=sampler, trials=3), tmp_path, rate)

    def never(config, folder):
        raise AssertionError("nothing is left")

    assert search.run_search(make_config(sampler=sampler, trials=3), tmp_path, never) == first
    more = search.run_search(make_config(sampler=sampler), tmp_path, rate)
    assert more[:3] == first and len(more) == 6
    assert params(more) == params(search.run_search(make_config(sampler=sampler), tmp_path / "at once", rate))


def test_a_search_in_object_storage_is_the_one_on_a_disk(tmp_path):
    """Its journal has a part for each entry; two that share it never take one number."""
    out = files.user_path(f"memory://bucket/{tmp_path.name}", "--out")
    first = search.run_search(make_config(trials=2), out, rate)
    assert first == search.run_search(make_config(trials=2), tmp_path / "disk", rate)
    more = search.run_search(make_config(trials=3), out, rate)
    assert more[:2] == first and len(more) == 3
    assert (out / "table.md").read_text().startswith("3 of 3 trials: 3 finished")
    one, other = search._Parts(out / "journal"), search._Parts(out / "journal")
    for number, journal in enumerate((one, other, one)):
        journal.append_logs([{"entry": number}])
    assert [entry["entry"] for entry in one.read_logs(0)] == [0, 1, 2] and list(other.read_logs(2)) == [{"entry": 2}]


class Killed(BaseException):
    """As a stop signal: no handler of errors catches it."""


def test_an_interrupted_trial_is_finished_first_in_its_folder_with_its_parameters(tmp_path):
    calls = []

    def measure(config, folder):
        calls.append((folder.name, config.agents.learning_rate))
        if len(calls) == 3:
            raise Killed
        return config.agents.learning_rate

    with pytest.raises(Killed):
        search.run_search(make_config(), tmp_path, measure)
    trials = search.run_search(make_config(), tmp_path, measure)
    assert [name for name, _ in calls] == ["000", "001", "002", "002", "003", "004", "005"]
    assert calls[2] == calls[3] and [trial["state"] for trial in trials] == ["finished"] * 6
    assert params(trials) == params(search.run_search(make_config(), tmp_path / "whole", rate))


#: A worker: OUT, trials, and the trial in which it kills itself. It appends every trial that it measures to OUT/log.
WORKER = """
import os, signal, sys
from pathlib import Path
from experiments import search as example
from mmrf_jax.sweeps import search

out, trials, dies = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
config = example.get_config()
config.update({"trials": trials, "sampler": "random", "pruner": "none"})

def measure(config, folder):
    with (out / "log").open("a") as log:
        log.write(f"{os.getpid()} {folder.name}\\n")
    if folder.name == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    return config.agents.learning_rate

search.run_search(config, out, measure)
"""


def worker(out: Path, trials: int, dies: str = "") -> subprocess.Popen:
    out.mkdir(exist_ok=True)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", WORKER, str(out), str(trials), dies], env=env, cwd=ROOT)


def measured(out: Path) -> list[str]:
    return [line.split()[1] for line in (out / "log").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_process_leaves_its_trial_to_the_next(tmp_path):
    out = tmp_path / "search"
    assert worker(out, 4, dies="001").wait() == -signal.SIGKILL
    trials = search.run_search(make_config(trials=4), out, lambda config, folder: config.agents.learning_rate)
    assert measured(out) == ["000", "001"]
    assert [trial["state"] for trial in trials] == ["finished"] * 4
    whole = search.run_search(
        make_config(trials=4), tmp_path / "whole", lambda config, folder: config.agents.learning_rate
    )
    assert trials == whole


@pytest.mark.slow
def test_processes_share_the_trials(tmp_path):
    out = tmp_path / "search"
    processes = [worker(out, 12) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert sorted(measured(out)) == [f"{n:03d}" for n in range(12)]  # each once
    trials = json.loads((out / "trials.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["finished"] * 12
    assert params(trials) == params(search.run_search(make_config(trials=12), tmp_path / "alone", rate))


def test_a_trial_of_a_living_process_is_left_alone(tmp_path):
    """While one process trains trial 0, another does the rest and ends."""
    inside = []

    def measure(config, folder):
        if folder.name == "000" and not inside:
            inside.append(search.run_search(make_config(trials=3), tmp_path, measure))
        return config.agents.learning_rate

    trials = search.run_search(make_config(trials=3), tmp_path, measure)
    assert [trial["state"] for trial in inside[0]] == ["not finished", "finished", "finished"]
    assert [trial["state"] for trial in trials] == ["finished"] * 3


def test_a_torn_line_of_the_journal_is_cut_off(tmp_path):
    search.run_search(make_config(trials=2), tmp_path, rate)
    with (tmp_path / "search.journal").open("ab") as journal:
        journal.write(b'{"op_code": 5, "wor')
    assert [trial["state"] for trial in search.run_search(make_config(trials=3), tmp_path, rate)] == ["finished"] * 3


def test_rungs():
    assert search.rungs(3, 3) == [1, 3]
    assert search.rungs(9, 3) == [1, 3, 9]
    assert search.rungs(8, 3) == [1, 3, 8]
    assert search.rungs(1, 2) == [1]
    assert search.rungs(5, 2) == [1, 2, 4, 5]


def test_asha_by_hand(tmp_path):
    """η = 2 and 4 rounds: rungs 1, 2, 4. Values of the trials at the rungs, in the order in which they run:

    trial 0: 5 is the only one, so it goes on; 5 at rung 2 the only one; 5 finished.
    trial 1: 4 at rung 1, of {5, 4} the best 1 is 5: pruned.
    trial 2: 6 at rung 1, of {6, 5, 4} the best 1 is 6: on. 3 at rung 2, of {5, 3} the best 1 is 5: pruned.
    trial 3: 5 at rung 1, of {6, 5, 5, 4} the best 2 are 6 and 5: on. 7 at rung 2, of {7, 5, 3}: on. 9 finished.
    """
    at = {"000": {1: 5, 2: 5, 4: 5}, "001": {1: 4}, "002": {1: 6, 2: 3}, "003": {1: 5, 2: 7, 4: 9}}
    calls = []

    def measure(config, folder):
        calls.append((folder.name, config.alternation.rounds))
        return float(at[folder.name][config.alternation.rounds])

    config = make_config(trials=4, pruner="asha", reduction=2, **{"run.alternation.rounds": 4})
    trials = search.run_search(config, tmp_path, measure)
    assert calls == [(name, rounds) for name, values in at.items() for rounds in values]
    assert [trial["state"] for trial in trials] == ["finished", "pruned", "pruned", "finished"]
    assert [trial["value"] for trial in trials] == [5.0, 4.0, 3.0, 9.0]
    assert [trial["number"] for trial in search.ranked(trials, "maximize")] == [3, 0, 2, 1]
    assert [trial["number"] for trial in search.ranked(trials, "minimize")] == [0, 3, 2, 1]


def test_finished_trials_rank_by_value_whatever_their_rounds(tmp_path):
    config = make_config(trials=8)
    with config.unlocked():
        config.space = {"alternation": {"rounds": {"low": 1, "high": 8}}}
    trials = search.run_search(config, tmp_path, lambda config, folder: float(config.alternation.rounds))
    values = [trial["value"] for trial in trials]
    assert len(set(values)) > 2 and all(type(trial["params"]["alternation.rounds"]) is int for trial in trials)
    for direction in ("maximize", "minimize"):
        found = [trial["value"] for trial in search.ranked(trials, direction)]
        assert found == sorted(values, reverse=direction == "maximize")


def test_asha_resumes_at_its_rung(tmp_path):
    """Killed in round 2 of the first trial: the value of round 1 is known, and only round 2 is trained again."""
    calls = []

    def measure(config, folder):
        calls.append((folder.name, config.alternation.rounds))
        if len(calls) == 2:
            raise Killed
        return 1.0 / len(calls)

    config = make_config(trials=2, pruner="asha", reduction=2, **{"run.alternation.rounds": 2})
    with pytest.raises(Killed):
        search.run_search(config, tmp_path, measure)
    trials = search.run_search(config, tmp_path, measure)
    assert calls == [("000", 1), ("000", 2), ("000", 2), ("001", 1)]
    assert [trial["state"] for trial in trials] == ["finished", "pruned"]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_rule_is_optuna_s(direction):
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=direction, pruner=pruner)
    values: list[float] = []
    for value in np.random.default_rng(0).permutation(40) // 2:  # with ties
        trial = study.ask()
        trial.report(float(value), 1)
        values.append(float(value))
        assert search.promoted(values[-1], values, 3, direction) == (not trial.should_prune())


def test_a_run_that_diverges_fails_alone(tmp_path):
    def measure(config, folder):
        if folder.name == "001":
            raise FloatingPointError("steps 1 to 9: the loss is not finite")
        return config.agents.learning_rate

    trials = search.run_search(make_config(trials=3), tmp_path, measure)
    assert [trial["state"] for trial in trials] == ["finished", "failed", "finished"]
    assert trials[1]["error"] == "steps 1 to 9: the loss is not finite" and trials[1]["value"] is None


def test_a_run_that_is_refused_ends_the_search_once(tmp_path):
    def refuse(config, folder):
        raise ValueError("no log there")

    with pytest.raises(ValueError, match="no log there"):
        search.run_search(make_config(trials=3), tmp_path, refuse)
    trials = search.run_search(make_config(trials=3), tmp_path, rate)
    assert [trial["state"] for trial in trials] == ["failed", "finished", "finished"]


def test_another_search_in_the_folder_is_refused(tmp_path):
    search.run_search(make_config(trials=1), tmp_path, rate)
    search.run_search(make_config(trials=1, **{"run.log_every": 7}), tmp_path, rate)  # may change, as in a run
    with pytest.raises(ValueError, match=r"config\.space\.agents\.polyak\.low was 0.01, now 0.02; use another --out"):
        search.run_search(make_config(trials=2, **{"space.agents.polyak.low": 0.02}), tmp_path, rate)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"agents": {"learning_rte": [0.1]}},
            "config.space: unknown config field 'agents.learning_rte'; did you mean lea",
        ),
        ({"agents": {"polyak": {"low": 0.2, "high": 0.1}}}, "polyak: low 0.2 is not below high 0.1"),
        ({"agents": {"polyak": {"low": 0.1, "high": 0.1}}}, "polyak: low 0.1 is not below high 0.1"),
        ({"agents": {"polyak": {"low": 0.1}}}, "config.space.agents.polyak has no high"),
        ({"agents": {"polyak": {"low": 0.1, "high": 1.5}}}, r"polyak.high is 1.5; use a number in \(0, 1\]"),
        ({"agents": {"learning_rate": {"low": 0.0, "high": 0.1, "log": True}}}, "a logarithmic range begins above 0"),
        ({"train": {"batch": {"low": 1.5, "high": 8}}}, "config.space.train.batch.low is 1.5; use a whole number"),
        ({"train": {"batch": []}}, r"config.space.train.batch is \[\]; give a list of choices"),
        ({"train": {"batch": [8, 0]}}, r"config.space.train.batch\[1\] is 0; use"),
        ({"method": {"low": 1, "high": 2}}, "config.space.method is a range, but the field is no number"),
        ({}, "config.space is empty"),
    ],
)
def test_a_bad_space_is_refused(space, message, tmp_path):
    config = make_config()
    with config.unlocked():
        config.space = space
    with pytest.raises(ValueError, match=message) as error:
        search.run_search(config, tmp_path / "out", rate)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("metric", "offline.long_view.gauc", "test days must not decide"),
        ("metric", "valid.long_view.gauc", "needs logs"),
        ("direction", "up", "unknown config.direction='up'; choose among maximize, minimize"),
        ("trials", 0, "config.trials is 0; use --config.trials=1 or more"),
        ("reduction", 1, "config.reduction is 1"),
    ],
)
def test_a_search_that_would_fail_does_not_begin(field, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        search.run_search(make_config(**{field: value}), tmp_path / "out", rate)
    assert not list(tmp_path.iterdir())


def test_rounds_are_not_searched_by_asha(tmp_path):
    config = make_config(pruner="asha")
    with config.unlocked():
        config.space = {"alternation": {"rounds": [2, 3]}}
    with pytest.raises(ValueError, match="rounds are the rungs of asha"):
        search.run_search(config, tmp_path / "out", rate)


def test_the_metric_is_a_path():
    results = {"ab_test": {"mmrf": {"watch_time": {"mean": 3}, "name": "a"}}}
    assert search.metric_of(results, "ab_test.mmrf.watch_time.mean") == 3.0
    with pytest.raises(
        ValueError, match=r"no ab_test\.mmrf\.watchtime\.mean in the results \(watchtime: did you mean watch_time"
    ):
        search.metric_of(results, "ab_test.mmrf.watchtime.mean")
    with pytest.raises(ValueError, match=r"valid\.click\.gauc has no value"):
        search.metric_of({"valid": {"click": {"gauc": None}}}, "valid.click.gauc")
    with pytest.raises(ValueError, match=r"ab_test\.mmrf\.name is str, not a number"):
        search.metric_of(results, "ab_test.mmrf.name")


def test_the_metric_is_of_the_run_s_own_arm_or_of_the_validation_days(monkeypatch, tmp_path):
    one = configs.override(configs.Run(), alternation={"rounds": 2})
    asked = []

    def trained(config, folder, brief):
        asked.append((config.alternation.rounds, folder, brief))
        arms = {"production": {"watch_time": {"mean": 1.0}}, "mmrf": {"watch_time": {"mean": 2.5}}}
        return {"ab_test": arms, "valid": {"click": {"gauc": 0.9}}}

    monkeypatch.setattr(search.train, "train_run", trained)
    monkeypatch.setattr(
        search.measurements, "measure_run", lambda config, folder, name: {"click": {"gauc": 0.6}, "of": name}
    )
    assert search._measure("ab_test.{method}.watch_time.mean")(one, tmp_path) == 2.5
    assert search._measure("valid.click.gauc")(one, tmp_path) == 0.6
    assert asked == [(2, tmp_path, True)] * 2


def test_choices_may_be_tuples(tmp_path):
    config = make_config(trials=4)
    with config.unlocked():
        config.space = {"ab_test": {"arms": (("production",), ("production", "random"))}}
    seen = set()

    def measure(config, folder):
        seen.add(config.ab_test.arms)
        return 0.0

    search.run_search(config, tmp_path, measure)
    assert seen == {("production",), ("production", "random")}


def test_the_page_has_the_best_finished_trials(tmp_path):
    pytest.importorskip("bokeh")

    def measure(config, folder):
        folder.mkdir(parents=True)
        files.write_json(folder / "config.json", configs.as_dict(config))
        return config.agents.learning_rate

    trials = search.run_search(make_config(trials=3), tmp_path, measure)
    page = (tmp_path / "compare.html").read_text()
    best = search.ranked(trials, "maximize")[0]
    assert f"Differences are to {best['number']:03d}, the first." in page and "The best 3 finished trials" in page


def test_without_optuna_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(extras.MissingExtra, match=r"^optuna is not installed; pip install"):
        search.run_search(make_config(), tmp_path / "out", rate)
    assert not list(tmp_path.iterdir())
