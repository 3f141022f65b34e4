"""Every number of every experiment file has a range, in the place that has its default."""

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import kuairand, table_ablation, table_estimators, world
from mmrf_jax import fields
from mmrf_jax.configs import logs
from mmrf_jax.io import files
from mmrf_jax.training import configs

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")


def outside(spec, value):
    """Values that a number of a config cannot have, in the form of `value`."""
    wrong = [2**40, -(2**40), math.nan] if fields.kind(spec) is int else [math.nan, math.inf, -math.inf]
    return [(one, *value[1:]) for one in wrong] if isinstance(value, tuple) else wrong


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_number_of_an_experiment_has_a_range(name):
    """Of runs, overlays of quick runs and variants: a field that is declared nowhere, or without a range, fails."""
    config = importlib.import_module(f"experiments.{name}").get_config()
    configs.validate_config(config.to_dict())
    values = config.to_dict()
    declared, numbers = configs.declared_fields(values), 0
    for field, value in files.flat(values).items():
        if field.startswith(("policies.", "against.", "space.")):  # `configs.validate_config` has checked a space
            continue
        spec = configs.declared_field(field, declared)
        assert spec is not None, f"{field} is declared nowhere"
        if fields.kind(spec) in (int, float):
            numbers += 1
            for wrong in outside(spec, value):
                assert fields.fix(spec, wrong) is not None, f"{field} may be {wrong}"
    assert numbers >= 40


@pytest.mark.parametrize(
    ("make", "field", "value", "message"),
    [
        (
            world,
            "feedback.learning_rate",
            -0.003,
            "config.feedback.learning_rate is -0.003; use --config.feedback.learning_rate=0 or more",
        ),
        (
            world,
            "agents.learning_rate",
            math.nan,
            "config.agents.learning_rate is nan; use --config.agents.learning_rate=0 or more",
        ),
        (world, "agents.temperature", math.inf, "config.agents.temperature is inf; use a number above 0"),
        (world, "agents.polyak", -1.0, "config.agents.polyak is -1.0; use a number in (0, 1]"),
        (world, "agents.id_dim", -1, "config.agents.id_dim is -1; use --config.agents.id_dim=1 or more"),
        (world, "alternation.conflict_batches", -1, "use --config.alternation.conflict_batches=0 or more"),
        (world, "alternation.temperature", math.nan, "config.alternation.temperature is nan; use "),
        (world, "agents.uncertainty_bonus", -math.inf, "config.agents.uncertainty_bonus is -inf; use a finite number"),
        (world, "agents.max_rows", 0, "config.agents.max_rows is 0; use --config.agents.max_rows=1 or more"),
        (world, "feedback.twin_feature_dropout", (0.0, 1.0), "use for each a number in [0, 1)"),
        (world, "ab_test.sessions", 1, "config.ab_test.sessions is 1; use --config.ab_test.sessions=2 or more"),
        (world, "when_quick.log_every", 0, "config.when_quick.log_every is 0; use --config.when_quick.log_every=1"),
        (
            world,
            "agents.ablation",
            "nosuch",
            "unknown config.agents.ablation='nosuch'; choose among none, no_collaboration",
        ),
        (world, "world.candidates", 3, "world.candidates=3 must lie between"),
        (world, "agents.dim", 9, "agents.dim=9 leaves no room"),
        (kuairand, "data.request_gap_minutes", 0.0, "config.data.request_gap_minutes is 0.0; use a number above 0"),
        (kuairand, "data.valid_until", 20220501, "valid_until=20220501 is not after train_until"),
        (kuairand, "agents.signal_weights", (1.0,), "agents.signal_weights has 1 numbers; give 9"),
        (kuairand, "alternation.closed_loop", True, "needs a simulator to serve in"),
        (kuairand, "collect.random_share", 0.1, "is for logs of the world, not of kuairand; use --config.data.random"),
        (
            logs,
            "collect.random_share",
            0.1,
            "is for logs of the world, not of logs; use --config.data.random_log=train",
        ),
        (world, "collect.random_share", 1.5, "config.collect.random_share is 1.5; use a number in [0, 1]"),
        (world, "feedback.debias", "xx", "unknown config.feedback.debias='xx'; choose among propensity"),
        (table_estimators, "policies.myopic_03", ("oracle_myopic", math.nan), "config.policies.myopic_03"),
        (table_estimators, "log_users", 1, "config.log_users is 1; use --config.log_users=2 or more"),
        (table_ablation, "seeds", 0, "config.seeds is 0; use --config.seeds=1 or more"),
        (table_ablation, "run.train.batch", 0, "config.run.train.batch is 0; use --config.run.train.batch=1 or more"),
        (table_ablation, "variants.da.agents.ablation", "xx", "unknown config.variants.da.agents.ablation='xx'"),
    ],
)
def test_numbers_of_a_config_that_cannot_be(make, field, value, message):
    config = make.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError) as error:
        configs.validate_config(config.to_dict())
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["world", "kuairand", "logs"])
def test_a_typed_config_says_what_its_file_says(name):
    given = importlib.import_module(f"experiments.{name}").get_config().to_dict()
    del given["when_quick"]
    run = configs.run_of(given)
    written = json.loads(json.dumps(configs.as_dict(run)))
    assert configs.run_of(written) == run
    values, plain = files.flat(given), files.flat(written)

    def same(x):
        return list(x) if isinstance(x, tuple) else x

    assert {field: same(x) for field, x in values.items() if x is not None}.items() <= plain.items()
    other = configs.override(run, train={"batch": 7})
    assert other.train.batch == 7 and dataclasses.replace(other, train=run.train) == run


def test_a_quick_config_has_its_overlay_below_what_is_set():
    values = {**world.get_config().to_dict(), "when_quick": {"log_every": 5, "train": {"batch": 8, "epochs": 3}}}
    for overrides in ({"quick": True, "train": {"batch": 16}}, {"quick": True, "train.batch": 16}):
        resolved = configs.resolve_config(values, overrides)
        assert (resolved["log_every"], resolved["train"]["batch"], resolved["train"]["epochs"]) == (5, 16, 3)
        assert resolved["train"]["segment"] == 8 and "when_quick" not in resolved and values["train"]["batch"] == 32
    assert configs.resolve_config(values, {"train": {"batch": 16}})["log_every"] == 50
    assert configs.resolve_config({**values, "quick": True}, {})["log_every"] == 5
    for wrong, message in (
        ({"train": {"bacth": 1}}, "unknown config field 'train.bacth'; did you mean batch"),
        ({"trian": {"batch": 1}}, "unknown config field 'trian.batch'; did you mean train"),
        ({"train": 5}, "config field 'train' has fields, set one of them: train.batch, train.candidates"),
    ):
        with pytest.raises(ValueError, match=message):
            configs.resolve_config(values, wrong)


def test_a_field_that_no_config_has_is_named_with_those_like_it():
    config = world.get_config()
    config.agents.lerning_rate = 0.1
    with pytest.raises(ValueError, match=r"unknown config field 'agents.lerning_rate'; did you mean learning_rate or "):
        configs.validate_config(config.to_dict())


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("agents.lerning_rate", "did you mean learning_rate"),
        ("agent.learning_rate", "did you mean agents?"),
        ("sed", "did you mean seed or seeds?"),
        ("collect.xyz", "there are random_share, sessions, slots, test_sessions"),
        ("train.batch.size", "it has no fields"),
    ],
)
def test_advice_for_an_unknown_field(name, advice):
    text = configs.unknown_field(name, configs.declared_fields(world.get_config().to_dict()))
    assert text.startswith(f"unknown config field {name!r}; {advice}")


def test_experiment_files_are_read_without_jax():
    script = "import importlib, sys\n"
    script += "".join(f"importlib.import_module('experiments.{name}').get_config()\n" for name in EXPERIMENTS)
    script += "assert not {'jax', 'polars'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
