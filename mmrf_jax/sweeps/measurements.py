"""What studies measure of their runs, by table, and the tables as text."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mmrf_jax.data.session_log import Sessions
from mmrf_jax.io import files, tables
from mmrf_jax.metrics import offline
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.sweeps import seeds
from mmrf_jax.sweeps.study import Study, run_place
from mmrf_jax.training import (
    arms,
    configs,
    evaluate,
    off_policy,
    restore,
    run_folder,
    simulated_tests,
    sources,
    world_truth,
)
from mmrf_jax.training.trained_run import TrainedRun

Rows = dict[str, dict[str, float | None]]  # {arm: {metric: value}}

AB_METRICS = (
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
_CAP = "10"  # of NCIS in the tables; `mmrf evaluate` reports all caps


def _is_hate_per_video(metric: str) -> bool:
    """Return whether a metric is NCIS of hate. GAUC of hate measures how well hates are predicted: more is better."""
    return metric == "NCIS hate"


class Table(NamedTuple):
    """A measurement that a study can make.

    Attributes:
      title: a line above the table.
      measure: (study, seed) -> values of each arm.
      of_world: whether it needs the world's truth or its users.
      of_runs: the entry of `OF_RUNS` that it needs of each run; "" for none.
      reference: the name of the study's reference in the rows, in a format of the variant's.
      serves: whether it is an A/B test.
      lower_is_better: whether lower values of a metric are better.
    """

    title: str
    measure: Callable[[Study, int], Rows]
    of_world: bool = True
    of_runs: str = ""
    reference: str = "{}"
    serves: bool = False
    lower_is_better: Callable[[str], bool] = seeds.less_is_better


def _learned(folder: Path) -> str:
    """Return a hash that identifies one training of a run."""
    return hashlib.sha256((folder / "learned.json").read_bytes()).hexdigest()


def _ab_test(study: Study, seed: int, *, name: str, variant: str | None = None, days: int = 1) -> dict[str, Any]:
    """Run the seed's paired A/B test, or read it from OUT/NAME_SEED.json.

    It is in a variant of the world; None: in that of the study's reference.
    """
    config, trained, path = study.config, study.configs(seed), study.out / f"{name}_{seed}.json"
    places = {name: run_place(one, study.runs_dir) for name, one in trained.items()}
    world = {} if variant is None else {"variant": variant}
    played_in = configs.override(trained[config.reference], ab_test={"sessions": config.sessions}, world=world)
    names = study.arms()
    wanted = {
        "arms": names,
        "learned": {name: _learned(place) for name, place in places.items()},
        "played_in": run_place(played_in, study.runs_dir).name,
        "days": days,
    }
    kept = run_folder.read_json(path) if path.exists() else {}
    if {name: kept.get(name) for name in wanted} != wanted:
        partitioner = Partitioner()
        source = restore.source_of(played_in, partitioner)
        policies = {name: arms.policy_of(str(places.get(name, name)), source, partitioner) for name in names}
        kept = wanted | simulated_tests.run_ab_test(source, policies, partitioner, days=days)
        files.write_json(path, kept)
    return kept


def _means(study: Study, seed: int, *, name: str, variant: str | None = None) -> Rows:
    """Return the mean metrics of each arm in an A/B test."""
    test = _ab_test(study, seed, name=name, variant=variant)["ab_test"]
    return {arm: {metric: test[arm][metric]["mean"] for metric in AB_METRICS} for arm in study.arms()}


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


def _off_policy(run: TrainedRun) -> dict[str, Any]:
    """Return `off_policy.estimate_ranker` on each held-out log."""
    return {
        name: off_policy.estimate_ranker(run, log, _propensities(run.source, name, log))
        for name, log in run.source.test().items()
    }


_fitted: dict[tuple[str, str], off_policy.Propensities] = {}  # of real logs, shared by all runs of a study


def _propensities(source: sources.Source, name: str, log: Sessions) -> off_policy.Propensities:
    """Return the log's propensities; a real log needs a fitted behaviour model."""
    if source.config.source == "world":
        return off_policy.log_propensities_of(source, log)
    key = (json.dumps(dataclasses.asdict(source.config.data), sort_keys=True), name)
    if key not in _fitted:
        _fitted[key] = off_policy.log_propensities_of(source, log)
    return _fitted[key]


#: Measurements of a single run, {file in its folder, without .json: run -> JSON}.
OF_RUNS: dict[str, Callable[[TrainedRun], dict[str, Any]]] = {
    "truth": world_truth.compare_with_truth,
    "off_policy": _off_policy,
    "valid": evaluate.ranking_of_valid,
}


def measure_run(config, place: Path, name: str) -> dict[str, Any]:
    """Return one of `OF_RUNS` of a run, cached in its folder."""
    path, learned = place / f"{name}.json", _learned(place)
    kept = run_folder.read_json(path) if path.exists() else {}
    if kept.get("learned") != learned or (name == "truth" and "unseen" not in kept):  # older ones lack it
        kept = OF_RUNS[name](restore.load_run(config, place)) | {"learned": learned}
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
            measure_run(config, run_place(config, study.runs_dir), "truth")["selection_bias"].items()
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
        for predictor, signals in sorted(
            measure_run(config, run_place(config, study.runs_dir), "truth")["unseen"].items()
        )
    }


def _offline(study: Study, seed: int, log: str = "test") -> Rows:
    """Return the GAUC of each variant on a held-out log, and the NCIS estimates of its stochastic ranker."""
    result: Rows = {}
    for variant, config in study.configs(seed).items():
        place = run_place(config, study.runs_dir)
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
        reference="agents of {}",
        lower_is_better=lambda metric: True,
    ),
    "unseen": Table(
        "Predictions for the videos that production's held-out log did not show, against the truth:",
        _unseen,
        of_runs="truth",
        reference="model of {}",
        lower_is_better=lambda metric: not metric.endswith("GAUC"),
    ),
    "offline": Table(
        f"Held-out log (NCIS per video, cap {_CAP}):",
        _offline,
        of_world=False,
        of_runs="off_policy",
        lower_is_better=_is_hate_per_video,
    ),
    "offline_frozen": Table(
        "The held-out log, scored without any feedback of its days:",
        functools.partial(_offline, log="test_frozen_history"),
        of_world=False,
        of_runs="off_policy",
        lower_is_better=_is_hate_per_video,
    ),
    "offline_random": Table(
        f"Random log of the test days (NCIS per video, cap {_CAP}):",
        functools.partial(_offline, log="random_test"),
        of_world=False,
        of_runs="off_policy",
        lower_is_better=_is_hate_per_video,
    ),
}
#: Tables of a run's rows by round, {table: title}; means over seeds.
BY_ROUND = {
    "model_exploitation_gap": "What the newest policy earns in the feedback model and in the world, seconds per "
    "session:",
    "conflict": "Cosine of each agent's gradient and the main agent's, on what actors share and on the encoder, and "
    "the attention that the main agent gives it:",
}


def by_round(folders: Iterable[Path], name: str) -> list[dict[str, float]]:
    """Return the rows of each round, averaged over seeds; empty if the runs have none."""
    by_seed = [run_folder.read_json(path / "learned.json")[name] for path in folders]

    def mean(rows, key):
        return sum(row[key] for row in rows) / len(rows)

    keys = [key for key in (by_seed[0][0] if by_seed[0] else ()) if key not in ("step", "seed", "phase")]
    return [{key: mean(rows, key) for key in keys} for rows in zip(*by_seed, strict=True)]


def format_study(table: dict[str, Any]) -> str:
    """Format the tables of a study as Markdown."""
    sessions = f", {table['sessions']:,} sessions in each arm and seed" if table["sessions"] else ""
    others = "".join(f" {name} is compared with {other}." for name, other in table["against"].items())
    known = "95 % intervals over seeds"
    if table["seeds"] < seeds.MIN_SEEDS:
        known = f"too few for intervals, which need {seeds.MIN_SEEDS} seeds"
    number = f"{table['seeds']} seed{'s' if table['seeds'] > 1 else ''}"
    parts = [f"{number}{sessions}; {known}.{others}"]
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
    for name, title in BY_ROUND.items():
        if table.get(name):
            keys = list({key: None for rows in table[name].values() for key in rows[0]})  # unique, in order
            lines = [
                [arm, str(number), *(_number(row.get(key)) for key in keys)]
                for arm, rows in table[name].items()
                for number, row in enumerate(rows, 1)
            ]
            parts += [title, tables.markdown(["arm", "round", *keys], lines)]
    return "\n\n".join(parts) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:+.3f}" if abs(value) < 10.0 else f"{value:,.0f}"
