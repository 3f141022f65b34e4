"""What pyproject.toml promises: the core, its extras, and requirements.txt."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>= ]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_the_core():
    core = "jax flax optax orbax-checkpoint chex absl-py ml-collections numpy scipy flatbuffers"
    assert names(PROJECT["dependencies"]) == set(core.split())


def test_requirements_are_the_core_and_the_report():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert sorted(lines) == sorted(PROJECT["dependencies"] + EXTRAS["report"])


def test_all_is_every_extra():
    assert set(re.findall(r"[a-z0-9]+", EXTRAS["all"][0].partition("[")[2])) == set(EXTRAS) - {"all"}


def test_every_version_has_both_bounds():
    """Each is tested: the lowest allowed by `make smoke-oldest`, the newest by `make smoke`."""
    every = [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]
    versions = [one for one in every if not one.startswith("mmrf_jax[")]
    open_above = [one for one in versions if not re.search(r">=[\d.]+,<[\d.]+$", one)]
    assert len(versions) > 20 and open_above == ["flatbuffers>=24.3.25"]


def test_every_extra_that_the_code_names_exists():
    sources = [path.read_text() for path in (ROOT / "mmrf_jax").rglob("*.py")]
    named = {name for source in sources for name in re.findall(r'extras\.needed\("(\w+)"\)', source)}
    assert named == {"report", "data", "baselines", "serve", "optuna", "beam"} <= set(EXTRAS)
