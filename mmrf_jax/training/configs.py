"""The config of a run as a dataclass, and configs as ConfigDicts and nested dictionaries: checked, merged, converted.

Experiment files build a `Run` and return it as a ConfigDict, which `--config.a.b=value` overrides. `validate_config`
checks such a ConfigDict, its `when_quick` overlay and a study's variants against the same fields. This module does not
need JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mmrf_jax import fields
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.envs.short_video.config import WorldConfig
from mmrf_jax.fields import field
from mmrf_jax.io import files, trackers
from mmrf_jax.models.encoder_config import EncoderConfig
from mmrf_jax.training.config_sections import (
    LOGS,
    ABTest,
    Alternation,
    Collect,
    EstimatorStudy,
    Feedback,
    KuaiRandData,
    LogData,
    MixedPolicy,
    OwnLogs,
    Search,
    Study,
    Train,
)

SOURCES, SIMULATORS, ANSWERS = ("world", "kuairand", "logs"), ("world", "feedback"), ("sampled", "expected")


@dataclasses.dataclass(frozen=True)
class Run:
    """The config of a mmrf train run."""

    seed: int = field(0, "of logs, initial parameters and A/B test; the world has world.seed", fields.NATURAL)
    seeds: int = field(
        1, "trained side by side by one program, from seed on, each with its own run folder WORKDIR/seed…", fields.COUNT
    )
    quick: bool = field(False, "a tiny form, for tests and first looks")
    source: str = field("world", "where sessions come from", among=SOURCES)
    method: str = field(
        "mmrf",
        "mmrf; a baseline: bc, wide_deep, deepfm, pareto, tscac, massa, td3_bc, iql, ltr, myopic; or a plug-in's",
    )
    plugins: tuple[str, ...] = field((), "modules that register methods and policies of this run; see --import")
    init_from: str | None = field(
        None, "run folder whose learned parameters this run starts from; see docs/warm-start.md"
    )
    simulator: str = field(
        "world", "what simulates feedback; feedback: the model of the run simulator_checkpoint", among=SIMULATORS
    )
    simulator_checkpoint: str = field("", "run folder whose feedback model simulates feedback")
    simulator_answers: str = field("sampled", "whether that model returns sampled or expected feedback", among=ANSWERS)
    world: WorldConfig | None = dataclasses.field(default_factory=WorldConfig)
    data: LogData | KuaiRandData | OwnLogs = dataclasses.field(default_factory=LogData)
    collect: Collect = dataclasses.field(default_factory=Collect)
    alternation: Alternation = dataclasses.field(default_factory=Alternation)
    feedback: Feedback = dataclasses.field(default_factory=Feedback)
    agents: AgentConfig = dataclasses.field(default_factory=AgentConfig)
    train: Train = dataclasses.field(default_factory=Train)
    ab_test: ABTest = dataclasses.field(default_factory=ABTest)
    memory_limit: float = field(
        0.0,
        "GiB of each device that a run may take; 0: what the device reports; CPUs report none",
        fields.NOT_NEGATIVE,
    )
    log_every: int = field(50, "steps between logged metrics", fields.COUNT)
    checkpoint_every: int = field(500, "steps between checkpoints", fields.COUNT)
    trackers: tuple[str, ...] = field(
        ("tensorboard", "csv"), "of metrics, in addition to metrics.jsonl", among=trackers.NAMES
    )
    profile_steps: str = field("", "or FIRST:LAST, such as 100:110: a trace of these steps in the run folder")

    @property
    def kuairand(self) -> KuaiRandData:
        """Return `data` of a run on KuaiRand."""
        assert isinstance(self.data, KuaiRandData), self.source
        return self.data

    @property
    def own_logs(self) -> OwnLogs:
        """Return `data` of a run on an own log."""
        assert isinstance(self.data, OwnLogs), self.source
        return self.data

    @property
    def sizes(self) -> WorldConfig | KuaiRandData | OwnLogs:
        """Return the section that defines the number of candidates and of exposed videos per request."""
        if self.world is not None:
            return self.world
        return self.kuairand if self.source == "kuairand" else self.own_logs


def to_config_dict(config: Any, without: Collection[str] = (), **more: Any) -> ConfigDict:
    """Make the ConfigDict of a config, for experiment files to return.

    Args:
      config: a `Run`, `Study`, `Search` or `EstimatorStudy`.
      without: dotted names of fields to omit from the ConfigDict; they keep their defaults.
      **more: additional entries, such as `when_quick`.
    """
    entries: dict[str, Any] = {}
    for name, spec, value in _fields_of(config):
        if not any(f"{name}.".startswith(f"{other}.") for other in without):
            unset = value is None or (spec.metadata["optional"] and value == spec.default)
            entries = _replaced(entries, name.split("."), placeholder(fields.kind(spec)) if unset else value)
    return ConfigDict({**entries, **more})


def _fields_of(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yield the dotted name, declaration and value of each field of config files, in the sections that a run has."""
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if spec.metadata.get("internal"):
            continue
        if dataclasses.is_dataclass(value):
            yield from _fields_of(value, f"{prefix}{spec.name}.")
        elif spec.metadata:
            yield f"{prefix}{spec.name}", spec, value


def run_of(values: Mapping[str, Any]) -> Run:
    """Make the typed config of a run from nested dictionaries, as in config files and `config.json`.

    Absent and None fields get their defaults; `when_quick` is ignored.

    Raises:
      ValueError: for an unknown field, or a value outside a field's range.
    """
    values = {name: value for name, value in values.items() if name != "when_quick"}
    validate_config(values)
    return _filled(_template(values), values)


def resolve_config(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with some fields replaced; a quick one also has its `when_quick`, below `overrides`.

    Args:
      values: the config of a run or study as nested dictionaries.
      overrides: fields to replace, as nested dictionaries or by dotted name, such as {"train.batch": 64}.

    Raises:
      ValueError: as `validate_config`.
    """
    resolved = {name: value for name, value in values.items() if name != "when_quick"}
    layers = [files.flat(overrides)]
    if layers[0].get("quick", values.get("quick")):
        layers.insert(0, files.flat(values.get("when_quick") or {}))
    for layer in layers:
        for name, value in layer.items():
            resolved = _replaced(resolved, name.split("."), value)
    validate_config(resolved)
    return resolved


def _replaced(values: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Return nested dictionaries with the value at a path replaced."""
    first, *rest = path
    if rest:
        section = values.get(first)
        value = _replaced(section if isinstance(section, Mapping) else {}, rest, value)
    return {**values, first: value}


def override(run: Run, **sections: Mapping[str, Any]) -> Run:
    """Return a run's config with some fields of some sections replaced, as in `override(run, train={"batch": 64})`."""
    changed = {name: dataclasses.replace(getattr(run, name), **values) for name, values in sections.items()}
    return dataclasses.replace(run, **changed)


def as_dict(config: Any) -> dict[str, Any]:
    """Return a run's config, or a section of it, as nested dictionaries, which `run_of` reads back."""
    out: dict[str, Any] = {}
    for name, _, value in _fields_of(config):
        out = _replaced(out, name.split("."), list(value) if isinstance(value, tuple) else value)
    return out


def _filled(config: Any, values: Mapping[str, Any]) -> Any:
    given: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        value, current = values.get(spec.name), getattr(config, spec.name)
        if dataclasses.is_dataclass(current) and not spec.metadata.get("internal"):
            given[spec.name] = _filled(current, value or {})
        elif value is not None:
            given[spec.name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(config, **given)


def validate_config(values: Mapping[str, Any]) -> None:
    """Check the fields of a run's or study's config, given as nested dictionaries, against their types and ranges.

    Raises:
      ValueError: for the first invalid field, naming the field, its value and what to use.
    """
    declared = declared_fields(values)
    for name, value in files.flat(values).items():
        if name.startswith("space."):
            continue
        if name.startswith("policies."):
            if not isinstance(value, tuple | list) or len(value) != 2:
                raise ValueError(f"config.{name} is {value!r}; give a ranker and its weight, such as ('random', 0.1)")
            fields.check(MixedPolicy(*value), f"config.{name}")
            continue
        spec = declared_field(name, declared)
        if spec is None:
            if value is not None and not name.startswith("against."):
                raise ValueError(unknown_field(name, declared))
        else:
            fields.refuse(spec, f"config.{name}", value)
    if "space" in values:
        _validate_space(values["space"], values["run"])
    _validate_together(values.get("run", values))


def space_of(space: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the ranges and the choices of a search's space, by the dotted name of the run's field."""
    found: dict[str, Any] = {}
    for name, value in space.items():
        if isinstance(value, Mapping) and not value.keys() <= {"low", "high", "log"}:
            found |= space_of(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _validate_space(space: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Refuse a space of unknown fields, or with values that a run would refuse."""
    declared, found = _specs_of_run(run), space_of(space)
    if not found:
        raise ValueError("config.space is empty; name a field of the run and its range or choices")
    for field_name, values in found.items():
        name, spec = f"config.space.{field_name}", declared.get(field_name)
        if spec is None:
            raise ValueError(f"config.space: {unknown_field(field_name, declared)}")
        if isinstance(values, Mapping):
            _validate_range(spec, name, values)
        elif not isinstance(values, list | tuple) or len(values) == 0:
            raise ValueError(f"{name} is {values!r}; give a list of choices, or a range such as {_RANGE_EXAMPLE}")
        else:
            for i, value in enumerate(values):
                fields.refuse(spec, f"{name}[{i}]", value)


_RANGE_EXAMPLE = {"low": 1e-4, "high": 1e-2, "log": True}


def _validate_range(spec: dataclasses.Field, name: str, given: Mapping[str, Any]) -> None:
    if isinstance(spec.default, tuple) or fields.kind(spec) not in (int, float):
        raise ValueError(f"{name} is a range, but the field is no number; give a list of choices")
    for end in ("low", "high"):
        if given.get(end) is None:
            raise ValueError(f"{name} has no {end}; give a range such as {_RANGE_EXAMPLE}")
        fields.refuse(spec, f"{name}.{end}", given[end])
    if not given["low"] < given["high"]:
        raise ValueError(f"{name}: low {given['low']!r} is not below high {given['high']!r}; exchange them")
    if given.get("log", False) not in (True, False):
        raise ValueError(f"{name}.log is {given['log']!r}; use True or False")
    if given.get("log") and given["low"] <= 0:
        raise ValueError(f"{name}.low is {given['low']!r}; a logarithmic range begins above 0")


def unknown_field(name: str, names: Iterable[str]) -> str:
    """Return the message that a config has no such field, with the nearest of `names`."""
    known, parts = [other.split(".") for other in names], name.split(".")
    at = next((i for i in range(len(parts)) if parts[: i + 1] not in [other[: i + 1] for other in known]), len(parts))
    siblings = {other[at] for other in known if other[:at] == parts[:at] and len(other) > at}
    if at == len(parts):  # a section
        return f"config field {name!r} has fields, set one of them: {', '.join(sorted(_below(parts, known)))}"
    advice = fields.nearest(parts[at], siblings) if siblings else "it has no fields"
    return f"unknown config field {name!r}; {advice}"


def _below(section: list[str], known: Iterable[list[str]]) -> set[str]:
    size = len(section)
    return {".".join(other[: size + 1]) for other in known if other[:size] == section and len(other) > size}


def declared_fields(config: Mapping[str, Any]) -> dict[str, dataclasses.Field]:
    """Return the declarations of all fields of a config by dotted name, including those of `run`.

    Raises:
      ValueError: if `source` does not match the fields.
    """
    if "run" not in config:
        return _specs_of_run(config)
    found = {f"run.{name}": spec for name, spec in _specs_of_run(config["run"]).items()}
    kind = EstimatorStudy if "policies" in config else Search if "space" in config else Study
    return found | {spec.name: spec for spec in dataclasses.fields(kind)}


def _specs_of_run(config: Mapping[str, Any]) -> dict[str, dataclasses.Field]:
    source = config.get("source")
    if source not in SOURCES or (source == "world") != ("world" in config):
        raise ValueError(
            f"config.source={source!r} does not go with this config; each source has a packaged config of its name: "
            f"{', '.join(SOURCES)}"
        )
    return {name: spec for name, spec, _ in _fields_of(_template(config))}


def _template(values: Mapping[str, Any]) -> Run:
    """Return a run with the defaults of its source."""
    source = values["source"]
    return Run() if source == "world" else Run(source=source, world=None, data=LOGS[source]())


def declared_field(name: str, declared: Mapping[str, dataclasses.Field]) -> dataclasses.Field | None:
    """Return the declaration of a field, including fields of `when_quick` or of a variant; None if there is none."""
    parts = [part for part in name.split(".") if part != "when_quick"]
    return declared.get(".".join(["run", *parts[2:]] if parts[0] == "variants" else parts))


def _validate_together(run: Mapping[str, Any]) -> None:
    """Refuse combinations of values that are valid separately but not together."""
    kinds: dict[str, Any] = {"agents": AgentConfig, "feedback": Feedback}
    kinds |= {"world": WorldConfig} if run["source"] == "world" else {"data": LOGS[run["source"]]}
    for section, kind in kinds.items():
        given = {name: value for name, value in run.get(section, {}).items() if value is not None}
        made = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
        if isinstance(made, EncoderConfig) and run["source"] != "logs":  # the others have the signals of short videos
            made.check_signals()
    logs_only = run["source"] != "world" and run.get("simulator", "world") == "world"
    if logs_only and run.get("alternation", {}).get("closed_loop"):
        raise ValueError("config.alternation.closed_loop needs a simulator to serve in; set it to False for logs")
    if run["source"] != "world" and run.get("collect", {}).get("random_share") is not None:
        raise ValueError(
            f"config.collect.random_share is for logs of the world, not of {run['source']}; "
            "use --config.data.random_log=train"
        )
