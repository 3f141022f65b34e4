"""The package's public names: lazy imports, docstrings' examples, and the scripts of examples/."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmrf_jax as mmrf

ROOT = Path(__file__).resolve().parents[1]


def test_importing_takes_no_jax():
    script = (
        "import sys, mmrf_jax as mmrf\n"
        "mmrf.metrics.gauc, mmrf.ope.estimate, mmrf.abtest.compare, mmrf.Estimate\n"
        "assert 'jax' not in sys.modules and set(mmrf.__all__) <= set(dir(mmrf)) | {'__version__'}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'metric'; its public names are"):
        _ = mmrf.metric


@pytest.mark.parametrize(
    "name",
    [
        *("metrics", "ope", "ope.policy_value", "abtest.effects", "agents.registry", "plugins"),
        *("envs.registry", "envs.policies", "wrappers", "envs.gymnasium_envs"),
    ],
)
def test_examples_print_what_they_say(name):
    if "gymnasium" in name:
        pytest.importorskip("gymnasium")
    found = doctest.testmod(importlib.import_module(f"mmrf_jax.{name}"))
    assert found.attempted and not found.failed


SLOW = {"environment", "gymnasium_env", "own_logs", "own_method", "ppo", "quickstart"}
EXAMPLES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])
    for path in sorted((ROOT / "examples").glob("*.py"))
]


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples_run(path, tmp_path):
    if path.stem == "gymnasium_env":
        pytest.importorskip("gymnasium")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr
    if path.stem == "ppo":
        assert int(re.search(r"PPO: .* \+(\d+) %", done.stdout)[1]) >= 50, done.stdout
