"""Studies: every variant of a run with every seed, an A/B test of each seed, and one table of them all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import ml_collections

from mmrf_jax.evaluation import seeds
from mmrf_jax.metrics import files
from mmrf_jax.metrics.progress import say
from mmrf_jax.parallel import mesh as par
from mmrf_jax.training import alternation, judging, loop, methods, sources, truth
from mmrf_jax.training import workdir as wd

_METRICS = ("watch_time", "depth", "click", "long_view", "like", "follow", "comment", "forward", "hate")
_ERRORS = ("click", "long_view", "like", "watch_time")


def run_config(config, variant: str, seed: int) -> ml_collections.ConfigDict:
    """The config of one run of a study.

    Raises:
      ValueError: where a variant sets a field that runs do not have.
    """
    run = ml_collections.ConfigDict(config.run.to_dict()).lock()
    for name, value in wd.flat(config.variants[variant].to_dict()).items():
        try:
            run.update_from_flattened_dict({name: value})
        except (AttributeError, KeyError) as error:
            raise ValueError(
                f"variant {variant} sets {name}, which runs do not have; the fields are those of config.run"
            ) from error
    run.seed = seed
    return ml_collections.ConfigDict({name: v for name, v in run.to_dict().items() if name != "when_quick"})


def folder(config, runs: Path) -> Path:
    """Where the run of a config is kept: the same for all studies that need it."""
    fixed = {name: value for name, value in wd.flat(config.to_dict()).items() if not wd.is_free(name)}
    return runs / hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def _check(config) -> list[str]:
    """The variants, the reference first; refuses before anything is trained what would fail after it."""
    variants = sorted(config.variants, key=lambda name: (name != config.reference, name))
    if config.reference not in variants:
        raise ValueError(f"config.reference={config.reference!r} is no variant; choose among {', '.join(variants)}")
    for name in variants:
        one = run_config(config, name, 0)
        if one.source != "world" or one.simulator != "world":
            raise ValueError(f"variant {name} is not of the world, whose truth studies are judged by; leave it out")
        if not methods.get(one.method).predicts and name == config.reference:
            raise ValueError(f"config.reference={name!r} predicts no feedback; compare with another variant")
    loop.check_arms(config.arms, sources.world_policies(), "config.arms")
    loop.check_least(config, {"seeds": 1, "sessions": 2})
    return variants


def run(config, out: Path, runs: Path) -> dict[str, Any]:
    """Runs what is not there yet, then writes OUT/table.json and OUT/table.md. Returns the table.

    Args:
      config: of a study, see experiments/table_ablation.py. runs: folder of the runs, shared by studies.
    """
    variants = _check(config)
    tests, errors = [], []
    for seed in range(config.seeds):
        configs = {name: run_config(config, name, seed) for name in variants}
        for name, one in configs.items():
            say(f"study: {name}, seed {seed + 1} of {config.seeds}, in {folder(one, runs)}")
            loop.train(one, folder(one, runs))
            _forget()
        tests.append(_ab_test(config, configs, seed, out, runs))
        errors.append(_errors(configs, runs))
    folders = {
        name: [folder(run_config(config, name, seed), runs) for seed in range(config.seeds)] for name in variants
    }
    table = {
        "ab_test": seeds.across(tests, config.reference),
        "errors": seeds.across(errors, f"agents of {config.reference}"),
        "optimism": {name: rows for name, paths in folders.items() if (rows := _optimism(paths))},
        "seeds": config.seeds,
        "sessions": config.sessions,
        "runs": {name: [path.name for path in paths] for name, paths in folders.items()},
    }
    files.write_json(out / "table.json", table)
    files.write_text(out / "table.md", format_table(table))
    return table


def _forget() -> None:
    """Frees compiled programs: each holds memory maps, and the system's limit on those ends a process of many runs."""
    jax.clear_caches()


def _learned(folder: Path) -> str:
    """Tells one training of a run from another."""
    return hashlib.sha256((folder / "learned.json").read_bytes()).hexdigest()


def _ab_test(config, configs: dict[str, Any], seed: int, out: Path, runs: Path) -> dict[str, dict[str, float]]:
    """{arm: {metric: mean}} of the seed's paired A/B test, kept in OUT/ab_test_SEED.json."""
    path = out / f"ab_test_{seed}.json"
    places = {name: folder(one, runs) for name, one in configs.items()}
    played_in = configs[config.reference].copy_and_resolve_references()
    played_in.ab_test.sessions = config.sessions
    arms = [*places, *config.arms]
    wanted = {
        "arms": arms, "learned": {name: _learned(place) for name, place in places.items()},
        "played_in": folder(played_in, runs).name,
    }  # fmt: skip
    kept = wd.read_json(path) if path.exists() else {}
    if {name: kept.get(name) for name in wanted} != wanted:
        mesh = par.make_mesh()
        source = loop.source_of(played_in, mesh)
        policies = {name: loop.policy_of(str(places.get(name, name)), source, mesh) for name in arms}
        kept = wanted | judging.compare(played_in, source, policies, mesh)
        files.write_json(path, kept)
    return {arm: {name: entry["mean"] for name, entry in kept["ab_test"][arm].items()} for arm in arms}


def _errors(configs: dict[str, Any], runs: Path) -> dict[str, dict[str, float]]:
    """{predictor of a variant: {signal and kind of video: mean error}}, kept in each run's truth.json."""
    result: dict[str, dict[str, float]] = {}
    for name, config in configs.items():
        place = folder(config, runs)
        path, learned = place / "truth.json", _learned(place)
        kept = wd.read_json(path) if path.exists() else {}
        if kept.get("learned") != learned:
            mesh = par.make_mesh()
            source = loop.source_of(config, mesh)
            state, plan = loop.load_state(config, source, place, mesh), alternation.plan_of(config)
            found = truth.compare(source, plan, state, source.test()["test"], source.train)
            kept = found | {"learned": learned}
            files.write_json(path, kept)
            _forget()
        for predictor, signals in sorted(kept["selection_bias"].items()):  # the order that a kept file has
            result[f"{predictor} of {name}"] = {
                f"{signal}, {kind}": signals[signal][key]
                for signal in _ERRORS
                for kind, key in (("shown", "impressions"), ("not shown", "non_impressions"))
            }
    return result


def _optimism(folders: list[Path]) -> list[dict[str, float]]:
    """[{"model", "world", "gap"}] of each round, means over seeds of what the policy earned, seconds a session."""
    by_seed = [wd.read_json(path / "learned.json")["optimism"] for path in folders]
    mean = lambda rows, name: sum(row[name] for row in rows) / len(rows)
    return [{name: mean(rows, name) for name in ("model", "world", "gap")} for rows in zip(*by_seed, strict=True)]


def format_table(table: dict[str, Any]) -> str:
    """The tables of a study as Markdown."""
    head = f"{table['seeds']} seeds, {table['sessions']:,} sessions in each arm and seed; 95 % intervals over seeds."
    errors = list(next(iter(table["errors"].values())))
    parts = [head]
    for names in (_METRICS[:3], _METRICS[3:6], _METRICS[6:]):
        parts.append(seeds.format_table(table["ab_test"], names))
    parts.append("Mean |predicted − true| on production's held-out log:")
    parts += [seeds.format_table(table["errors"], errors[i : i + 4]) for i in range(0, len(errors), 4)]
    if table["optimism"]:
        parts.append("What the newest policy earns in the feedback model and in the world, seconds a session:")
        lines = ["| arm | round | in the model | in the world | gap |", "|---|---|---|---|---|"]
        for name, rows in table["optimism"].items():
            for number, row in enumerate(rows, 1):
                cells = f"{row['model']:,.0f} | {row['world']:,.0f} | {row['gap']:+,.0f}"
                lines.append(f"| {name} | {number} | {cells} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
