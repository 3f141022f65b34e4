"""Searches: random, TPE and ASHA over fields of a run, resumed and shared through one folder.

    OUT/search.json      the search's config, which later starts must have
    OUT/search.journal   Optuna's journal: every trial, its parameters and values
    OUT/claims/NNN       locked by the process that works on trial NNN
    OUT/runs/NNN         the run folder of trial NNN
    OUT/trials.json, OUT/table.md, OUT/compare.html

Every process, on whatever machine, does the same: claim a trial, train it, record its value, until there are no more.
A claim is a lock of the kernel, so that of a killed process is free, and its trial is finished by the next process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrf_jax import fields
from mmrf_jax.io import extras, files, tables
from mmrf_jax.io.progress import say
from mmrf_jax.io.storage import RemotePath
from mmrf_jax.report import compare
from mmrf_jax.sweeps import measurements, work_queue
from mmrf_jax.sweeps.study import free_programs
from mmrf_jax.training import comparison, config_sections, configs, run_folder, run_report, train

#: (config of the run, its folder) -> the metric; it goes on from what the folder has.
Measure = Callable[[configs.Run, Path], float]

_PATIENCE = 600.0  # seconds to wait for the folder, which others hold while they choose parameters
_BEST = 20  # trials in the table and on the page
_STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "not finished"}


def check_search(config) -> None:
    """Refuse, before training, a search that would fail after it.

    Raises:
      ValueError: naming the field.
    """
    values = config.to_dict()
    configs.validate_config(values)
    run = configs.run_of(values["run"])
    names = configs.space_of(values["space"])
    if run.seeds > 1 or "seeds" in names:
        raise ValueError("a trial is one run, of one seed; leave out config.run.seeds and config.space.seeds")
    first = config.metric.split(".")[0]
    simulated = run.source == "world" or run.simulator == "feedback"
    if first not in ("ab_test", "valid"):
        raise ValueError(
            f"config.metric={config.metric!r} is no criterion for a choice, which test days must not decide; start it "
            "with ab_test (an A/B test in a simulator) or valid (validation days of a log)"
        )
    if first == "ab_test" and not simulated:
        raise ValueError(f"config.metric={config.metric!r} needs a simulator; use one such as valid.long_view.gauc")
    if first == "valid" and run.source == "world":
        known = config_sections.Search().metric
        raise ValueError(f"config.metric={config.metric!r} needs logs; use one such as {known}")
    if config.pruner == "asha" and "alternation.rounds" in names:
        raise ValueError("config.space.alternation.rounds: rounds are the rungs of asha; use --config.pruner=none")


def run_search(config, out: Path, measure: Measure | None = None) -> list[dict[str, Any]]:
    """Work on the trials of a search until none is left for this process, and return all trials.

    Args:
      config: of a search, see experiments/search.py.
      out: its folder, which all processes of the search share.
      measure: trains and evaluates a run; None for `train.train_run` and the config's metric.

    Raises:
      ValueError: if the search would fail, or the folder is of another search.
      MissingExtra: without Optuna.
    """
    with extras.needed("optuna"):
        import optuna
    check_search(config)
    measure = measure or _measure(config.metric)
    out.mkdir(parents=True, exist_ok=True)
    with files.held(out, _PATIENCE):
        _check_same(config, out / "search.json")
        study = _open(optuna, config, out)
    while True:
        with contextlib.ExitStack() as stack:
            if (trial := _claim(optuna, study, config, out, stack)) is None:
                break
            say(f"search: trial {trial.number} of {config.trials}, in {run_path(out, trial.number)}")
            _work(optuna, study, trial, config, out, measure)
        _write(study, config, out)
    found = _write(study, config, out)
    if left := [trial["number"] for trial in found if trial["state"] == _STATES["RUNNING"]]:
        say(f"search: other processes work on {len(left)} trials; the last of them completes the table")
    if ended := [trial for trial in ranked(found, config.direction) if trial["state"] == "finished"]:
        _write_page([run_path(out, trial["number"]) for trial in ended[:_BEST]], config, out)
    return found


def run_path(out: Path, number: int) -> Path:
    """Return the run folder of a trial."""
    return out / "runs" / f"{number:03d}"


def _claim_path(out: Path, number: int) -> Path:
    return out / "claims" / f"{number:03d}"


def rungs(rounds: int, reduction: int) -> list[int]:
    """Return the rounds after which ASHA decides, and the last round: reduction^0, reduction^1, …, rounds."""
    found = [1]
    while found[-1] * reduction < rounds:
        found.append(found[-1] * reduction)
    return found if found[-1] == rounds else [*found, rounds]


def promoted(value: float, values: Sequence[float], reduction: int, direction: str) -> bool:
    """Return whether ASHA trains a trial further: it is in the best 1/reduction of a rung, or the best of a few.

    Optuna's SuccessiveHalvingPruner has the same rule, but remembers that a trial has been asked about: one that was
    killed between this answer and its record would pass the rung.

    Args:
      value: of the trial at the rung.
      values: of all trials that have reached the rung, with this one.
      reduction: η.
      direction: "maximize" or "minimize".

    Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning", 2020, algorithm 2.
    """
    keep = max(len(values) // reduction, 1)
    if direction == "maximize":
        return value >= sorted(values, reverse=True)[keep - 1]
    return value <= sorted(values)[keep - 1]


def ranked(trials: Sequence[dict[str, Any]], direction: str) -> list[dict[str, Any]]:
    """Return trials from the best to the worst: finished ones by value, then pruned ones by rounds and value.

    A pruned trial's value is of fewer rounds, so it does not compete with those of finished ones.
    """

    def key(trial):
        value = trial["value"]
        if value is None:
            return 2, 0, 0.0, trial["number"]
        better = -value if direction == "maximize" else value
        if trial["state"] == "finished":
            return 0, 0, better, trial["number"]
        return 1, -max(map(int, trial["rounds"])), better, trial["number"]

    return sorted(trials, key=key)


def _check_same(config, path: Path) -> None:
    """Store the config of a new search; refuse one that differs from the stored, except for more trials."""
    values = {name: value for name, value in config.to_dict().items() if name not in ("trials", "when_quick")}
    values["run"].pop("when_quick", None)
    now = json.loads(json.dumps(files.plain(values)))
    if not path.exists():
        files.write_json(path, now)
        return
    if (found := run_folder.first_difference(run_folder.read_json(path), now, "run.")) is not None:
        name, before, after = found
        raise ValueError(
            f"--out={path.parent} is of another search: config.{name} was {before!r}, now {after!r}; use another --out "
            "or the old value"
        )


def _open(optuna, config, out: Path):
    """Return the search's study in Optuna's journal; the caller holds the folder."""
    from optuna.storages import journal

    optuna.logging.set_verbosity(logging.WARNING)
    path = out / "search.journal"
    storage = optuna.storages.JournalStorage(_journal(journal, path))
    return optuna.create_study(
        storage=storage,
        study_name="search",
        direction=config.direction,
        load_if_exists=True,
        sampler=_sampler(optuna, config, 0),
    )


def _journal(journal, path: Path):
    """Return Optuna's journal at a path."""
    if isinstance(path, RemotePath):
        return _Parts(path)
    lock = journal.JournalFileSymlinkLock(str(path))  # atomic on NFS too; one of a dead process is broken after 30 s
    if path.exists():
        lock.acquire()
        try:
            _mend(path)
        finally:
            lock.release()
    return journal.JournalFileBackend(str(path), lock_obj=lock)


class _Parts:
    """A journal in object storage (Optuna's `BaseJournalBackend`): each entry is a part that one process creates."""

    def __init__(self, path: RemotePath):
        self._path = path
        self._known: list[dict[str, Any]] = []
        self._parts = 0  # read

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        for name in self._path.appended()[self._parts :]:
            self._known += json.loads((self._path / name).read_text())
            self._parts += 1
        yield from self._known[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        number, entry = self._parts, json.dumps(logs).encode()
        while True:
            try:
                (self._path / f"{0:04d}-{number:08d}").write_bytes(entry, create=True)
                return
            except FileExistsError:  # by another process
                number += 1


def _mend(path: Path) -> None:
    """Cut off a last line that its process did not complete; Optuna could not read what comes after it."""
    text = path.read_bytes()
    if whole := len(text) - (text.rfind(b"\n") + 1):
        os.truncate(path, len(text) - whole)


def _sampler(optuna, config, number: int):
    """Return the sampler of one trial, seeded by its number: whichever process claims it, random search is the same."""
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed)


def _claim(optuna, study, config, out: Path, stack: contextlib.ExitStack):
    """Return a trial with its parameters, locked until the stack closes; None if there is none for this process.

    One process at a time is in here, so a trial without a lock has lost its process.
    """
    with files.held(out, _PATIENCE):
        trials = study.get_trials(deepcopy=False)
        trial = None
        for known in (known for known in trials if known.state.name == "RUNNING"):
            if work_queue.claim(_claim_path(out, known.number), stack):
                trial = optuna.trial.Trial(study, known._trial_id)
                break
        if trial is None:
            if len(trials) >= config.trials:
                return None
            study.sampler = _sampler(optuna, config, len(trials))
            trial = study.ask()
            work_queue.claim(_claim_path(out, trial.number), stack)
        suggest(trial, config)  # those of a trial that has them are the same again
        return trial


def suggest(trial, config) -> dict[str, Any]:
    """Return a trial's values of the fields of the space."""
    space = config.space.to_dict()
    declared = configs.declared_fields(config.to_dict())
    found: dict[str, Any] = {}
    for name, given in configs.space_of(space).items():
        if not isinstance(given, Mapping):  # as JSON, since choices may be tuples
            found[name] = json.loads(trial.suggest_categorical(name, [json.dumps(choice) for choice in given]))
            continue
        whole = fields.kind(declared[f"run.{name}"]) is int
        ask = trial.suggest_int if whole else trial.suggest_float
        found[name] = ask(name, given["low"], given["high"], log=bool(given.get("log")))
    return found


def _work(optuna, study, trial, config, out: Path, measure: Measure) -> None:
    """Train a claimed trial and record how it ended; a stop signal leaves it for the next process.

    Raises:
      ValueError: for a run that is refused; the trial counts as failed, so that the same command goes on without it.
    """
    states = optuna.trial.TrialState
    reached = dict(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
    try:
        one = _run_of(config, suggest(trial, config))
        last = one.alternation.rounds
        for rounds in rungs(last, config.reduction) if config.pruner == "asha" else [last]:
            if rounds not in reached:
                value = measure(configs.override(one, alternation={"rounds": rounds}), run_path(out, trial.number))
                trial.report(value, rounds)
                reached[rounds] = value
            at_rung = [other.intermediate_values.get(rounds) for other in study.get_trials(deepcopy=False)]
            values = [value for value in at_rung if value is not None]
            if rounds < last and not promoted(reached[rounds], values, config.reduction, config.direction):
                study.tell(trial, state=states.PRUNED)
                return
    except (ValueError, FloatingPointError) as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=states.FAIL)
        say(f"search: trial {trial.number} failed: {error}")
        if isinstance(error, ValueError):  # perhaps of all trials; numbers that are not finite are of this one
            raise
        return
    study.tell(trial, reached[last])


def _run_of(config, values: Mapping[str, Any]) -> configs.Run:
    """Return the config of a trial's run."""
    base = {name: value for name, value in config.run.to_dict().items() if name != "when_quick"}
    return configs.run_of(configs.resolve_config(base, values))


def _measure(metric: str) -> Measure:
    """Return the function that trains a run, or more rounds of it, and reads its metric."""

    def one(config: configs.Run, folder: Path) -> float:
        results: dict[str, Any] = train.train_run(config, folder, brief=True)
        if metric.startswith("valid."):
            results = {"valid": measurements.measure_run(config, folder, "valid")}
        free_programs()
        return metric_of(results, metric.format(method=config.method))

    return one


def metric_of(results: Mapping[str, Any], path: str) -> float:
    """Return the number at a dotted path.

    Raises:
      ValueError: if there is none; the message names what is there.
    """
    found: Any = results
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            advice = fields.nearest(name, found) if isinstance(found, Mapping) else "it has no parts"
            raise ValueError(f"config.metric: no {path} in the results ({name}: {advice}); use another --out with it")
        found = found[name]
    if found is None:
        raise ValueError(f"config.metric: {path} has no value; choose another metric, and another --out")
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"config.metric: {path} is {type(found).__name__}, not a number")
    return float(found)


def _write(study, config, out: Path) -> list[dict[str, Any]]:
    """Write OUT/trials.json and OUT/table.md, and return the trials."""
    with files.held(out, _PATIENCE):
        found = [_row(trial, config, out) for trial in study.get_trials(deepcopy=False)]
        files.write_json(out / "trials.json", {"metric": config.metric, "trials": found})
        files.write_text(out / "table.md", format_trials(found, config))
    return found


def _row(trial, config, out: Path) -> dict[str, Any]:
    space = configs.space_of(config.space.to_dict())
    params = {
        name: value if isinstance(space[name], Mapping) else json.loads(value) for name, value in trial.params.items()
    }
    return {
        "number": trial.number,
        "state": _STATES.get(trial.state.name, trial.state.name.lower()),
        "value": trial.value,
        "params": params,
        "rounds": {str(rounds): value for rounds, value in sorted(trial.intermediate_values.items())},
        "run": run_path(out, trial.number).relative_to(out).as_posix(),
        "error": trial.user_attrs.get("error"),
    }


def format_trials(trials: Sequence[dict[str, Any]], config) -> str:
    """Format the best trials as Markdown."""
    names = list(configs.space_of(config.space.to_dict()))
    counts = [f"{sum(trial['state'] == state for trial in trials)} {state}" for state in _STATES.values()]
    rows = [
        [
            str(trial["number"]),
            trial["state"],
            "–" if trial["value"] is None else f"{trial['value']:.6g}",
            max(trial["rounds"], key=int, default="–"),
            *(_text(trial["params"].get(name)) for name in names),
        ]
        for trial in ranked(trials, config.direction)[:_BEST]
    ]
    head = f"{len(trials)} of {config.trials} trials: {', '.join(counts)}. `{config.metric}`, {config.direction}."
    return f"{head}\n\n{tables.markdown(['trial', 'state', 'value', 'rounds', *names], rows)}\n"


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _write_page(folders: Sequence[Path], config, out: Path) -> None:
    """Write OUT/compare.html of run folders, the best first."""
    folders = [folder for folder in folders if (folder / "config.json").exists()]
    if len(folders) < 2:
        return
    if (missing := run_report.missing_for_report()) is not None:
        say(f"no page of the trials: {missing}")
        return
    runs, notes = comparison.load_runs(folders, out / "runs")
    chosen = f"The best {len(runs)} finished trials by {config.metric} ({config.direction}), the best first."
    with files.held(out, _PATIENCE):
        files.write_text(out / "compare.html", compare.build(runs, [chosen, *notes]))
