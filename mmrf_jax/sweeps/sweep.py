"""Studies: every variant of a run with every seed, and tables of their results.

    RUNS/NAME             the run folder of one variant and seed, named by its config
    RUNS/.claims/NAME     locked by the process that trains it
    OUT/.claims/NAME      locked by the process that runs one A/B test
    OUT/NAME_SEED.json    the A/B tests
    OUT/table.json, OUT/table.md

Processes share the runs and the A/B tests (`work_queue`), and the one that does the last of them writes the tables. The
seeds of a variant are trained `run.seeds` at a time, side by side (`training.side_by_side`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmrf_jax import plugins
from mmrf_jax.agents import registry
from mmrf_jax.io import files
from mmrf_jax.io.progress import say
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.sweeps import seeds, work_queue
from mmrf_jax.sweeps.measurements import AB_METRICS, BY_ROUND, TABLES, by_round, format_study, measure_run
from mmrf_jax.sweeps.study import Study, free_programs, run_config, run_place
from mmrf_jax.training import (
    arms,
    configs,
    simulator_source,
    steps,
    train,
)

_PATIENCE = 600.0  # seconds to wait for a process that writes the same tables


def _groups(config) -> list[range]:
    """Return the seeds of a study that are trained side by side: `run.seeds` at a time."""
    size = config.run.get("seeds") or 1
    return [range(first, first + size) for first in range(0, config.seeds, size)]


def check_study(study: Study) -> None:
    """Refuse, before training, a study that would fail after it."""
    config, names = study.config, study.names()
    configs.validate_config(config.to_dict())
    if config.reference not in names:
        raise ValueError(f"config.reference={config.reference!r} is no variant; choose among {', '.join(names)}")
    for name in itertools.chain(*study.against().items()):
        if name not in names:
            raise ValueError(f"{name!r} in config.against is no variant; choose among {', '.join(names)}")
    if config.seeds % (size := config.run.get("seeds") or 1):
        raise ValueError(
            f"config.run.seeds={size} are trained side by side, but config.seeds={config.seeds} is no multiple of "
            "that; change one of them"
        )
    for name in config.tables:
        if name not in (*TABLES, *BY_ROUND):
            raise ValueError(f"unknown table {name!r} in config.tables; choose among {', '.join((*TABLES, *BY_ROUND))}")
    needed = [name for name in config.tables if name in TABLES and TABLES[name].of_world]
    for name in names:
        one = run_config(config, name, 0)
        if needed and (one.collect.random_share is None) != (
            run_config(config, config.reference, 0).collect.random_share is None
        ):
            raise ValueError(
                f"variant {name} and {config.reference} differ in whether requests say they are random, so one A/B "
                "test cannot serve both; set collect.random_share of the others to 0"
            )
        if needed and (one.source != "world" or one.simulator != "world"):
            raise ValueError(
                f"variant {name} is not of the world, which {needed[0]} needs; leave it out of config.tables"
            )
        if (
            "errors" in needed
            and not registry.get(one.method, one.plugins).has_feedback_heads
            and name == config.reference
        ):
            raise ValueError(f"config.reference={name!r} predicts no feedback; compare with another variant")
        if "unseen" in needed and name == config.reference and not steps.plan_of(one, SHORT_VIDEO).use_feedback_model:
            raise ValueError(f"config.reference={name!r} has no feedback model; compare with another variant")
    if needed:
        registered = [
            name for name in config.arms if plugins.POLICIES.find(name, run_config(config, names[0], 0).plugins)
        ]
        arms.check_arms(config.arms, [*simulator_source.WORLD_ARMS, arms.POPULARITY, *registered], "config.arms")
    if unknown := [name for name in config.get("holm", ()) if name not in AB_METRICS]:
        raise ValueError(f"unknown metric {unknown[0]!r} in config.holm; choose among {', '.join(AB_METRICS)}")
    if "by_day" in needed:
        simulator_source.check_days(config.run, config.days)
        if config.days < 5:
            raise ValueError(f"config.days is {config.days}; use --config.days=5 or more")


def run_study(config, out: Path, runs_dir: Path) -> dict[str, Any] | None:
    """Train the missing runs, write OUT/table.json and OUT/table.md, and return the table.

    Processes that are started with the same folders share the work.

    Args:
      config: of a study, see experiments/table_ablation.py.
      out: folder to write.
      runs_dir: folder of the runs, shared by studies.

    Returns:
      The table; None if other processes still work on a part of it, of whom the last writes it.
    """
    study = Study(config, out, runs_dir)
    check_study(study)
    if left := work_queue.work(_tasks(study)):
        say(f"study: other processes work on {left} parts; the last of them completes the table")
        return None
    out.mkdir(parents=True, exist_ok=True)
    with files.held(out, _PATIENCE):
        table = _table(study)
        files.write_json(out / "table.json", table)
        files.write_text(out / "table.md", format_study(table))
    return table


def _tasks(study: Study) -> list[work_queue.Task]:
    """Return the runs of a study, then its A/B tests, each of which needs the runs of its seed."""
    config = study.config
    tasks: list[work_queue.Task] = []
    runs_of: dict[int, set[int]] = {seed: set() for seed in range(config.seeds)}
    last: list[str] = []  # the variant or table that this process has worked on

    def work(name: str, run: Callable[..., Any], *args: Any) -> None:
        if last and last[0] != name:
            free_programs()
        last[:] = [name]
        run(*args)

    for name in study.names():
        for group in _groups(config):  # seeds share one program
            runs = {run_place(one, study.runs_dir): one for one in (run_config(config, name, seed) for seed in group)}
            claim, *more = (study.runs_dir / ".claims" / place.name for place in runs)
            for seed in group:
                runs_of[seed].add(len(tasks))
            train_group = functools.partial(work, name, _train, study, name, runs)
            tasks.append(work_queue.Task(claim, train_group, more=tuple(more)))
    for name in (name for name in config.tables if name in TABLES and TABLES[name].serves):
        for seed in range(config.seeds):
            claim = study.out / ".claims" / f"{name}_{seed}"
            measure = functools.partial(work, f"table {name}", TABLES[name].measure, study, seed)
            tasks.append(work_queue.Task(claim, measure, frozenset(runs_of[seed])))
    return tasks


def _train(study: Study, name: str, runs: Mapping[Path, configs.Run]) -> None:
    """Train runs of a study side by side, or one alone, and measure what its tables need of them."""
    for place, one in runs.items():
        say(f"study: {name}, seed {one.seed + 1} of {study.config.seeds}, in {place}")
    train.train_runs(runs, brief=True)
    for place, one in runs.items():
        for kept in {TABLES[table].of_runs for table in study.config.tables if table in TABLES} - {""}:
            measure_run(one, place, kept)


def _table(study: Study) -> dict[str, Any]:
    """Return the tables of a study whose runs and A/B tests are done."""
    config = study.config
    table: dict[str, Any] = {}
    paths = {
        name: [run_place(run_config(config, name, seed), study.runs_dir) for seed in range(config.seeds)]
        for name in study.names()
    }
    for name in (name for name in config.tables if name in TABLES):
        measured = [TABLES[name].measure(study, seed) for seed in range(config.seeds)]
        table[name] = seeds.across_seeds(measured, TABLES[name].reference.format(config.reference), study.against())
        if TABLES[name].serves and config.get("holm"):
            table.setdefault("holm", {})[name] = _adjusted(study, table[name])
        free_programs()
    for name in (name for name in config.tables if name in BY_ROUND):
        table[name] = {arm: rows for arm, places in paths.items() if (rows := by_round(places, name))}
    served = any(TABLES[name].serves for name in config.tables if name in TABLES)
    table |= {"seeds": config.seeds, "sessions": config.sessions if served else None}
    table["against"] = study.against()
    table["runs"] = {name: [path.name for path in places] for name, places in paths.items()}
    return table


def _adjusted(study: Study, table: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return {metric: {arm: p-value adjusted for the number of variants}} of the metrics that `config.holm` names."""
    others = {name: study.config.reference for name in study.names() if name != study.config.reference}
    known = next(iter(table.values()))
    return {m: seeds.holm(table, m, others | study.against()) for m in study.config.holm if m in known}
