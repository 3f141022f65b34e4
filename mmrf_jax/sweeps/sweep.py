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

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from mmrf_jax import plugins
from mmrf_jax.agents import registry
from mmrf_jax.io import files
from mmrf_jax.io.progress import say
from mmrf_jax.metrics import offline
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.sweeps import seeds, work_queue
from mmrf_jax.training import (
    arms,
    configs,
    evaluate,
    off_policy,
    restore,
    run_folder,
    sources,
    steps,
    train,
    world_truth,
)

Rows = dict[str, dict[str, float | None]]  # {arm: {metric: value}}

_AB_METRICS = (
    "watch_time",
    "depth",
    "return_rate",
    "click",
    "long_view",
    "like",
    "follow",
    "comment",
    "forward",
    "hate",
    "coverage",
    "gini",
    "ild",
)
_DAILY = ("watch_time_per_day", "visits")
_ERRORS = ("click", "long_view", "like", "watch_time")
#: Metrics ranked by the served scores; all other signals are ranked by their own agent's.
_SERVED = ("long_view", "watch_time_median", "watch_time_xauc")
_ESTIMATED = ("watch_time", "click", "like", "follow", "comment", "forward", "hate")
_PATIENCE = 600.0  # seconds to wait for a process that writes the same tables
_CAP = "10"  # of NCIS in the tables; `mmrf evaluate` reports all caps


class Study(NamedTuple):
    """A study's config, its output folder, and the folder of its runs."""

    config: Any
    out: Path
    runs_dir: Path

    def names(self) -> list[str]:
        """Return the variants, the reference first."""
        return sorted(self.config.variants, key=lambda name: (name != self.config.reference, name))

    def against(self) -> dict[str, str]:
        """Return the references of the variants that are not compared with the study's reference."""
        return dict(self.config.get("against", {}))

    def arms(self) -> list[str]:
        """Return the arms of the A/B tests, in the order of the tables."""
        return [*self.names(), *self.config.arms]

    def configs(self, seed: int) -> dict[str, configs.Run]:
        return {name: run_config(self.config, name, seed) for name in self.names()}


class Table(NamedTuple):
    """A measurement that a study can make.

    Attributes:
      title: a line above the table.
      measure: (study, seed) -> values of each arm.
      of_world: whether it needs the world's truth or its users.
      of_runs: the entry of `_OF_RUNS` that it needs of each run; "" for none.
      reference: the name of the study's reference in the rows.
      serves: whether it is an A/B test.
      lower_is_better: whether lower values of a metric are better.
    """

    title: str
    measure: Callable[[Study, int], Rows]
    of_world: bool = True
    of_runs: str = ""
    reference: Callable[[str], str] = lambda name: name
    serves: bool = False
    lower_is_better: Callable[[str], bool] = seeds.less_is_better


def run_config(config, variant: str, seed: int) -> configs.Run:
    """Return the config of one run of a study.

    Raises:
      ValueError: if a variant sets a field that runs do not have.
    """
    run = ml_collections.ConfigDict(config.run.to_dict()).lock()
    for name, value in run_folder.flat(config.variants[variant].to_dict()).items():
        try:
            run.update_from_flattened_dict({name: value})
        except (AttributeError, KeyError) as error:
            raise ValueError(
                f"variant {variant} sets {name}, which runs do not have; the fields are those of config.run"
            ) from error
    return dataclasses.replace(configs.run_of(run.to_dict()), seed=seed, seeds=1)


def _groups(config) -> list[range]:
    """Return the seeds of a study that are trained side by side: `run.seeds` at a time."""
    size = config.run.get("seeds") or 1
    return [range(first, first + size) for first in range(0, config.seeds, size)]


def folder(config, runs_dir: Path) -> Path:
    """Return the folder of a config's run, which all studies share."""
    fixed = {
        name: value for name, value in run_folder.flat(configs.as_dict(config)).items() if not run_folder.is_free(name)
    }
    return runs_dir / hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def check(study: Study) -> None:
    """Refuse, before training, a study that would fail after it."""
    config, names = study.config, study.names()
    configs.validate(config.to_dict())
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
        if name not in (*TABLES, *_BY_ROUND):
            raise ValueError(
                f"unknown table {name!r} in config.tables; choose among {', '.join((*TABLES, *_BY_ROUND))}"
            )
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
        arms.check_arms(config.arms, [*sources.WORLD_ARMS, arms.POPULARITY, *registered], "config.arms")
    if unknown := [name for name in config.get("holm", ()) if name not in _AB_METRICS]:
        raise ValueError(f"unknown metric {unknown[0]!r} in config.holm; choose among {', '.join(_AB_METRICS)}")
    if "by_day" in needed:
        sources.check_days(config.run, config.days)
        if config.days < 5:
            raise ValueError(f"config.days is {config.days}; use --config.days=5 or more")


def run(config, out: Path, runs_dir: Path) -> dict[str, Any] | None:
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
    check(study)
    if left := work_queue.work(_tasks(study)):
        say(f"study: other processes work on {left} parts; the last of them completes the table")
        return None
    out.mkdir(parents=True, exist_ok=True)
    with files.held(out, _PATIENCE):
        table = _table(study)
        files.write_json(out / "table.json", table)
        files.write_text(out / "table.md", format_sweep(table))
    return table


def _tasks(study: Study) -> list[work_queue.Task]:
    """Return the runs of a study, then its A/B tests, each of which needs the runs of its seed."""
    config = study.config
    tasks: list[work_queue.Task] = []
    runs_of: dict[int, set[int]] = {seed: set() for seed in range(config.seeds)}
    last: list[str] = []  # the variant or table that this process has worked on

    def work(name: str, run: Callable[..., Any], *args: Any) -> None:
        if last and last[0] != name:
            forget()
        last[:] = [name]
        run(*args)

    for name in study.names():
        for group in _groups(config):  # seeds share one program
            runs = {folder(one, study.runs_dir): one for one in (run_config(config, name, seed) for seed in group)}
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
        name: [folder(run_config(config, name, seed), study.runs_dir) for seed in range(config.seeds)]
        for name in study.names()
    }
    for name in (name for name in config.tables if name in TABLES):
        measured = [TABLES[name].measure(study, seed) for seed in range(config.seeds)]
        table[name] = seeds.across(measured, TABLES[name].reference(config.reference), study.against())
        if TABLES[name].serves and config.get("holm"):
            table.setdefault("holm", {})[name] = _adjusted(study, table[name])
        forget()
    for name in (name for name in config.tables if name in _BY_ROUND):
        table[name] = {arm: rows for arm, places in paths.items() if (rows := _by_round(places, name))}
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


def forget() -> None:
    """Free compiled programs: each holds memory maps, and many runs in one process would exceed the system's limit."""
    jax.clear_caches()


def _learned(folder: Path) -> str:
    """Return a hash that identifies one training of a run."""
    return hashlib.sha256((folder / "learned.json").read_bytes()).hexdigest()


def _ab_test(study: Study, seed: int, *, name: str, variant: str | None = None, days: int = 1) -> dict[str, Any]:
    """Run the seed's paired A/B test, or read it from OUT/NAME_SEED.json.

    It is in a variant of the world; None: in that of the study's reference.
    """
    config, trained, path = study.config, study.configs(seed), study.out / f"{name}_{seed}.json"
    places = {name: folder(one, study.runs_dir) for name, one in trained.items()}
    world = {} if variant is None else {"variant": variant}
    played_in = configs.override(trained[config.reference], ab_test={"sessions": config.sessions}, world=world)
    names = study.arms()
    wanted = {
        "arms": names,
        "learned": {name: _learned(place) for name, place in places.items()},
        "played_in": folder(played_in, study.runs_dir).name,
        "days": days,
    }
    kept = run_folder.read_json(path) if path.exists() else {}
    if {name: kept.get(name) for name in wanted} != wanted:
        partitioner = Partitioner()
        source = restore.source_of(played_in, partitioner)
        policies = {name: arms.policy_of(str(places.get(name, name)), source, partitioner) for name in names}
        kept = wanted | evaluate.run_ab_test(played_in, source, policies, partitioner, days=days)
        files.write_json(path, kept)
    return kept


def _means(study: Study, seed: int, *, name: str, variant: str | None = None) -> Rows:
    """Return the mean metrics of each arm in an A/B test."""
    test = _ab_test(study, seed, name=name, variant=variant)["ab_test"]
    return {arm: {metric: test[arm][metric]["mean"] for metric in _AB_METRICS} for arm in study.arms()}


def _by_day(study: Study, seed: int) -> Rows:
    """Return each arm's metrics per user and day.

    They are over all days, over the first and the second half of the days after the first, as the ratio of these
    halves, and by day.
    """
    kept = _ab_test(study, seed, name="by_day", days=study.config.days)
    result: Rows = {}
    for arm in study.arms():
        result[arm] = row = {}
        for metric in _DAILY:
            days = [day["ab_test"][arm][metric]["mean"] for day in kept["by_day"]]
            half = (len(days) - 1) // 2
            early, late = sum(days[1 : half + 1]) / half, sum(days[-half:]) / half
            row[metric] = sum(days) / len(days)
            row[f"{metric}, days 2 to {half + 1}"] = early
            row[f"{metric}, last {half} days"] = late
            row[f"{metric}, late / early"] = late / early if early else None
            row |= {f"{metric}, day {i}": value for i, value in enumerate(days, 1)}
    return result


#: Measurements of a single run, {file in its folder, without .json: (config, source, plan, state) -> JSON}.
_OF_RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "truth": lambda config, source, plan, state: world_truth.compare_with_truth(
        source, plan, state, source.test()["test"], source.train
    ),
    "off_policy": lambda config, source, plan, state: {
        name: off_policy.evaluate(config, source, plan, state, log, _propensities(config, source, name, log))
        for name, log in source.test().items()
    },
    "valid": lambda config, source, plan, state: evaluate.ranking_of_valid(config, source, plan, state),
}
_fitted: dict[tuple[str, str], off_policy.Propensities] = {}  # of real logs, shared by all runs of a study


def _propensities(config, source: sources.Source, name: str, log) -> off_policy.Propensities:
    """Return the log's propensities; a real log needs a fitted behaviour model."""
    if config.source == "world":
        return off_policy.propensities(source, log)
    key = (json.dumps(dataclasses.asdict(config.data), sort_keys=True), name)
    if key not in _fitted:
        _fitted[key] = off_policy.propensities(source, log)
    return _fitted[key]


def measure_run(config, place: Path, name: str) -> dict[str, Any]:
    """Return one of `_OF_RUNS` of a run, cached in its folder."""
    path, learned = place / f"{name}.json", _learned(place)
    kept = run_folder.read_json(path) if path.exists() else {}
    if kept.get("learned") != learned or (name == "truth" and "unseen" not in kept):  # older ones lack it
        partitioner = Partitioner()
        source = restore.source_of(config, partitioner, workdir=place)
        state = restore.load_state(config, source, place, partitioner)
        kept = _OF_RUNS[name](config, source, steps.plan_of(config, source.spec.signals), state) | {"learned": learned}
        files.write_json(path, kept)
    return kept


def _errors(study: Study, seed: int) -> Rows:
    """Return the mean errors of each variant's predictors on videos that were shown and that were not."""
    return {
        f"{predictor} of {variant}": {
            f"{signal}, {kind}": signals[signal][key]
            for signal in _ERRORS
            for kind, key in (("shown", "impressions"), ("not shown", "non_impressions"))
        }
        for variant, config in study.configs(seed).items()
        for predictor, signals in sorted(  # the order of a stored file
            measure_run(config, folder(config, study.runs_dir), "truth")["selection_bias"].items()
        )
    }


def _unseen(study: Study, seed: int) -> Rows:
    """Return the quality of each variant's predictions for videos that were not shown."""
    names = {"ece": "ECE", "logloss": "log-loss", "gauc": "GAUC"}
    return {
        f"{predictor} of {variant}": {
            f"{signal}, {label}": entry[key] for signal, entry in signals.items() for key, label in names.items()
        }
        for variant, config in study.configs(seed).items()
        for predictor, signals in sorted(measure_run(config, folder(config, study.runs_dir), "truth")["unseen"].items())
    }


def _offline(study: Study, seed: int, log: str = "test") -> Rows:
    """Return the GAUC of each variant on a held-out log, and the NCIS estimates of its stochastic ranker."""
    result: Rows = {}
    for variant, config in study.configs(seed).items():
        place = folder(config, study.runs_dir)
        estimated, results = measure_run(config, place, "off_policy"), run_folder.read_json(place / "results.json")
        entries = results[offline.key("offline", log)]
        row = {f"GAUC {name}": entries[name]["gauc"] for name in _SERVED}
        for name in ("click", "like", "follow", "comment", "forward", "hate"):
            own = entries[name].get("gauc_agent")  # of the signal's own agent, if there is one
            row[f"GAUC {name}"] = entries[name]["gauc"] if own is None else own
        if log in estimated:
            signals = estimated[log]["units"]["video"]["signals"]
            row |= {f"NCIS {name}": signals[name]["ncis"][_CAP]["value"] for name in _ESTIMATED}
        result[variant] = row
    return result


def _of_errors(metric: str) -> bool:
    """Return whether lower is better: always, for errors."""
    return True


def _of_unseen(metric: str) -> bool:
    """Return whether lower is better: for all but GAUC."""
    return not metric.endswith("GAUC")


def _of_offline(metric: str) -> bool:
    """Return whether lower is better: for NCIS of hate. Its GAUC measures how well hates are predicted."""
    return metric == "NCIS hate"


TABLES = {
    "ab_test": Table("A/B test:", functools.partial(_means, name="ab_test"), serves=True),
    "ab_test_users": Table(
        "A/B test in the world with another mix of users:",
        functools.partial(_means, name="ab_test_users", variant="users"),
        serves=True,
    ),
    "ab_test_exit_hazard": Table(
        "A/B test in the world with another exit hazard:",
        functools.partial(_means, name="ab_test_exit_hazard", variant="exit_hazard"),
        serves=True,
    ),
    "by_day": Table("A/B test over days, of all users of an arm:", _by_day, serves=True),
    "errors": Table(
        "Mean |predicted − true| on production's held-out log:",
        _errors,
        of_runs="truth",
        reference=lambda name: f"agents of {name}",
        lower_is_better=_of_errors,
    ),
    "unseen": Table(
        "Predictions for the videos that production's held-out log did not show, against the truth:",
        _unseen,
        of_runs="truth",
        reference=lambda name: f"model of {name}",
        lower_is_better=_of_unseen,
    ),
    "offline": Table(
        f"Held-out log (NCIS per video, cap {_CAP}):",
        _offline,
        of_world=False,
        of_runs="off_policy",
        lower_is_better=_of_offline,
    ),
    "offline_frozen": Table(
        "The held-out log, scored without any feedback of its days:",
        functools.partial(_offline, log="test_frozen_history"),
        of_world=False,
        of_runs="off_policy",
        lower_is_better=_of_offline,
    ),
    "offline_random": Table(
        f"Random log of the test days (NCIS per video, cap {_CAP}):",
        functools.partial(_offline, log="random_test"),
        of_world=False,
        of_runs="off_policy",
        lower_is_better=_of_offline,
    ),
}
#: Tables of a run's rows by round, {table: title}; means over seeds.
_BY_ROUND = {
    "model_exploitation_gap": "What the newest policy earns in the feedback model and in the world, seconds per "
    "session:",
    "conflict": "Cosine of each agent's gradient and the main agent's, on what actors share and on the encoder, and "
    "the attention that the main agent gives it:",
}


def _by_round(folders: Iterable[Path], name: str) -> list[dict[str, float]]:
    """Return the rows of each round, averaged over seeds; empty if the runs have none."""
    by_seed = [run_folder.read_json(path / "learned.json")[name] for path in folders]

    def mean(rows, key):
        return sum(row[key] for row in rows) / len(rows)

    keys = [key for key in (by_seed[0][0] if by_seed[0] else ()) if key not in ("step", "seed", "phase")]
    return [{key: mean(rows, key) for key in keys} for rows in zip(*by_seed, strict=True)]


def format_sweep(table: dict[str, Any]) -> str:
    """Format the tables of a study as Markdown."""
    sessions = f", {table['sessions']:,} sessions in each arm and seed" if table["sessions"] else ""
    others = "".join(f" {name} is compared with {other}." for name, other in table["against"].items())
    known = "95 % intervals over seeds"
    if table["seeds"] < seeds.MIN_SEEDS:
        known = f"too few for intervals, which need {seeds.MIN_SEEDS} seeds"
    parts = [f"{table['seeds']} seeds{sessions}; {known}.{others}"]
    for name, entry in TABLES.items():
        if name in table:
            metrics = list(next(iter(table[name].values())))
            if name == "by_day":
                metrics = [metric for metric in metrics if ", day " not in metric]
            parts.append(entry.title)
            parts += [
                seeds.format_seeds(table[name], metrics[i : i + 4], entry.lower_is_better)
                for i in range(0, len(metrics), 4)
            ]
            parts += [
                f"{metric}, p-values adjusted for {len(values)} comparisons (Holm): "
                + ", ".join(f"{arm} {value:.3f}" for arm, value in values.items())
                for metric, values in table.get("holm", {}).get(name, {}).items()
                if values
            ]
    for name, title in _BY_ROUND.items():
        if table.get(name):
            keys = list({key: None for rows in table[name].values() for key in rows[0]})  # unique, in order
            lines = ["| arm | round | " + " | ".join(keys) + " |", "|---" * (len(keys) + 2) + "|"]
            for arm, rows in table[name].items():
                for number, row in enumerate(rows, 1):
                    lines.append(f"| {arm} | {number} | " + " | ".join(_number(row.get(key)) for key in keys) + " |")
            parts += [title, "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:+.3f}" if abs(value) < 10.0 else f"{value:,.0f}"
