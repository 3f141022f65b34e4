"""Arrows between the rooms point one way (WORKSPACE.md, "Rooms")."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: A room imports its own level and those before it; leaves import the vocabulary alone, and checkpointing io.
LEVELS = (
    {"types", "signals", "schema", "fields", "random", "ops", "estimate", "plugins"},
    {"data", "models", "metrics"},
    {"envs"},
    {"agents", "wrappers"},
    {"ope", "abtest"},
    {"report"},
    {"training"},
    {"sweeps", "serving", "configs"},
    {"runs", "testing"},
    {"cli"},
    {"launch", "experiments"},
)
LEAVES = {"parallel", "checkpointing", "io"}
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

FILES = sorted(
    path.relative_to(ROOT) for top in ("mmrf_jax", "launch", "experiments") for path in ROOT.glob(f"{top}/**/*.py")
)


def room_of(name: str) -> str | None:
    """The room of a dotted name of the project, as agents of `mmrf_jax.agents.mmrf.losses`."""
    first, *rest = name.split(".")
    if first == "mmrf_jax":
        return rest[0] if rest else None
    return first if first in LEVEL else None


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def nodes_of(source: str) -> list[ast.AST]:
    """The nodes of a source, parsed once for all tests."""
    return list(ast.walk(ast.parse(source)))


@functools.cache
def imports(source: str) -> frozenset[str]:
    """Dotted names of all that is imported anywhere in a source: modules, and what is taken from them."""
    names: set[str] = set()
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import of {node.module}; name the package"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def said(source: str) -> set[str]:
    """All identifiers of a source, comments and strings left out."""
    nodes = nodes_of(source)
    words = {node.id for node in nodes if isinstance(node, ast.Name)}
    words |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return words | {part for name in imports(source) for part in name.split(".")}


def wrong_arrows(module: str, source: str) -> list[str]:
    """What is wrong with the imports of a module, one line each."""
    here, names = room_of(module), imports(source)
    wrong = []
    for name in sorted(names):
        there = room_of(name)
        if there is None or there == here or here is None:
            continue
        if here in LEAVES:
            allowed = there == "types" or (here, there) == ("checkpointing", "io")
        else:
            allowed = there in LEAVES or LEVEL[there] <= LEVEL[here]
        concrete = name.startswith("mmrf_jax.envs.short_video")
        if not allowed or (concrete and here == "agents"):
            wrong.append(f"{module} imports {name}")
    return wrong


def test_every_room_has_its_place():
    rooms = {room_of(module_of(path)) for path in FILES} - {None}
    assert rooms == {*LEVEL, *LEAVES}


def test_arrows_point_one_way():
    offenders = []
    for path in FILES:
        source, module = (ROOT / path).read_text(), module_of(path)
        offenders += wrong_arrows(module, source)
        orbax = [name for name in imports(source) if name.split(".")[0] == "orbax"]
        placed = said(source) & {"Mesh", "make_mesh", "PartitionSpec", "NamedSharding", "process_index"}
        offenders += [f"{module} imports {name}" for name in orbax if room_of(module) != "checkpointing"]
        offenders += [f"{module} says {name}" for name in sorted(placed) if room_of(module) != "parallel"]
    assert not offenders, "\n".join(offenders)


def test_no_two_rooms_import_each_other():
    arrows = set()
    for path in FILES:
        here = room_of(module_of(path))
        arrows |= {(here, room_of(name)) for name in imports((ROOT / path).read_text())}
    both_ways = {(a, b) for a, b in arrows if None not in (a, b) and a != b and (b, a) in arrows}
    assert not both_ways


def test_only_sources_and_mains_know_a_concrete_environment():
    """Agents and rollouts serve any environment of the protocol."""
    knowing = set()
    for path in FILES:
        if any(name.startswith("mmrf_jax.envs.short_video") for name in imports((ROOT / path).read_text())):
            knowing.add(module_of(path))
    own = {name for name in knowing if name.startswith("mmrf_jax.envs.short_video.")}
    measuring = {name for name in knowing if name.startswith("mmrf_jax.cli.benchmarks.")}
    measuring.add("experiments.results.ladder")  # a run against the world's truth
    assert own and knowing - own - measuring <= {"mmrf_jax.training.simulator_source", "mmrf_jax.training.configs"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mmrf_jax.agents.mmrf.losses", "from mmrf_jax.training import train"),
        ("mmrf_jax.agents.mmrf.losses", "def f():\n    from mmrf_jax.envs.short_video import env"),
        ("mmrf_jax.agents.mmrf.losses", "import mmrf_jax.envs.short_video.env as s"),
        ("mmrf_jax.io.files", "from mmrf_jax.data import session_log"),
        ("mmrf_jax.types", "from mmrf_jax.data.session_log import InputSpec"),
        ("mmrf_jax.training.train", "from mmrf_jax.cli import common"),
    ],
)
def test_a_wrong_arrow_is_found(module, source):
    assert len(wrong_arrows(module, source)) == 1
    assert not wrong_arrows(module, "from mmrf_jax import types\nimport jax\nfrom mmrf_jax.types import Items")
