"""README.md and docs/: links resolve, commands parse, Python compiles, and the site's navigation has every page."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import mmrf_jax

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "WORKSPACE.md", "CONTRIBUTING.md", "CHANGELOG.md")), *DOCS]
PAGES += sorted((ROOT / "examples").rglob("*.md"))
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """Return a page without its code blocks."""
    return _FENCE.sub("", text)


def slugs(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_links_resolve(path):
    broken = []
    for target in _LINK.findall(prose(path.read_text())):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        to = (path.parent / name).resolve() if name else path
        if not to.is_relative_to(ROOT) or not to.exists() or (anchor and anchor not in slugs(to)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("path", [PAGES[0], *DOCS], ids=lambda path: path.stem)
def test_pages_are_short_and_wrapped(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("<!--")]
    assert len(lines) <= (200 if path.name == "README.md" else 150)
    lines = prose(path.read_text()).splitlines()
    assert not [line for line in lines if len(line) > 130 and not line.startswith("|") and "](http" not in line]


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_python_blocks_compile_and_name_what_exists(path):
    for language, code in _FENCE.findall(path.read_text()):
        if language == "python":
            tree = ast.parse(code)
            used = {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "mmrf"
            }
            assert used <= set(mmrf_jax.__all__)


def test_the_navigation_has_every_page_once():
    def pages(nav):
        for entry in nav:
            for to in entry.values():
                yield from pages(to) if isinstance(to, list) else [to]

    found = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(found) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in DOCS)
    listed = _LINK.findall((ROOT / "docs" / "index.md").read_text())
    assert set(found) - {"index.md"} <= set(listed)


def test_the_method_s_page_names_code_that_exists():
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+\.[A-Za-z_]+)`", (ROOT / "docs" / "method.md").read_text()))
    missing = []
    for name in named:
        *module, last = name.split(".")
        path = ROOT.joinpath("mmrf_jax", *module).with_suffix(".py")
        tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
        defined = {getattr(node, "name", None) for node in tree.body}
        defined |= {getattr(t, "id", None) for node in tree.body if isinstance(node, ast.Assign) for t in node.targets}
        if last not in defined:
            missing.append(name)
    assert len(named) > 15 and not missing


def test_the_path_of_a_batch_names_functions_that_exist():
    text = (ROOT / "docs" / "update.md").read_text()
    steps = re.findall(r"^\| \d \| `([\w/]+\.py)` \| `(\w+)`", text, re.MULTILINE)
    assert len(steps) == 5
    for file, name in steps:
        assert f"def {name}(" in (ROOT / "mmrf_jax" / file).read_text(), (file, name)


def commands(text: str) -> list[str]:
    """Return the shell commands of a page: lines of its blocks without a language, and code spans in its prose."""
    blocks = [code.replace("\\\n", " ") for language, code in _FENCE.findall(text) if not language]
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`((?:\S*python -m|make|pip|mmrf) [^`]+)`", prose(text))
    plain = (re.sub(r"\s#.*|[\[\]…]", "", line) for line in lines)
    return [
        " ".join(line.split()) for line in plain if re.search(r"python -m|^(make|pip|mmrf|docker|kubectl|cp) ", line)
    ]


COMMANDS = sorted({command for path in PAGES for command in commands(path.read_text())})
MAIN = re.compile(r"(?:-m launch\.|-m mmrf_jax\.cli |(?:^|\s)mmrf )([a-z][\w-]*)")


def calls(command: str) -> list[tuple[str, list[str]]]:
    """Return the mains of `launch` that a command runs, each with its flags."""
    _, *parts = MAIN.split(command)
    return [
        (name.replace("-", "_"), re.findall(r"(?<=\s)--\w\S*", part.replace("'", "")))
        for name, part in zip(parts[::2], parts[1::2], strict=True)
    ]


#: Each line of the input is a main and its calls; the output is what is wrong with them. Names in capitals and shell
#: variables stand for any value. A main is imported in a child, since each defines its own --config.
CHECK = """
import importlib, json, os, re, sys
from absl import flags
from mmrf_jax.io import files
from mmrf_jax.training import configs

def wrong(name, given):
    importlib.import_module(f"launch.{name}")
    file, known = None, files.flat(configs.as_dict(configs.Run()))
    for flag in given:
        key, equals, value = flag.removeprefix("--").partition("=")
        if key == "config" and re.fullmatch(r"(experiments/)?\\w+(\\.py)?", value):
            stem = value.removeprefix("experiments/").removesuffix(".py")
            known = files.flat(importlib.import_module(f"experiments.{stem}").get_config().to_dict())
        elif key.startswith("config."):
            if key.removeprefix("config.") not in known:
                yield f"no config has a field {key}"
        elif key not in {*flags.FLAGS, "help"}:
            yield f"launch.{name} has no flag --{key}"
        elif equals and key != "config" and not re.search(r"[A-Z$]{2,}|^N$|^$", value):
            flags.FLAGS[key].parser.parse(value)

sys.argv = ["docs"]
for line in sys.stdin:
    name, all_given = json.loads(line)
    read, write = os.pipe()
    if not os.fork():
        found = []
        for given in all_given:
            try:
                found += wrong(name, given)
            except Exception as error:
                found.append(f"launch.{name} {given}: {error!r}")
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    print(open(read).read(), flush=True)
    os.wait()
"""


def check(by_main: dict[str, list[list[str]]]) -> list[str]:
    """Return what is wrong with calls of the mains, {main: flags of each call}."""
    lines = "".join(json.dumps(entry) + "\n" for entry in by_main.items())
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], input=lines, capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [message for line in done.stdout.splitlines() for message in json.loads(line)]


def test_commands_have_flags_and_fields_that_exist():
    by_main: dict[str, list[list[str]]] = {}
    for command in COMMANDS:
        for name, given in calls(command):
            by_main.setdefault(name, []).append(given)
    assert len(by_main) > 10 and sum(map(len, by_main.values())) > 50
    assert not check(by_main)


def test_wrong_commands_are_found():
    for command, message in {
        "python -m launch.train --config=experiments/world.py --workdri=RUN": "launch.train has no flag --workdri",
        "python -m launch.train --config=experiments/world.py --config.agents.x=1": "a field config.agents.x",
        "python -m launch.ab_test --sessions=many --out=FILE": "sessions",
        "mmrf tarin --workdir=RUN": "launch.tarin",
    }.items():
        (found,) = check({name: [given] for name, given in calls(command)})
        assert message in found


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_files_and_targets_that_exist(command):
    for word in command.split():
        path = word.split("=")[-1].split(":")[0]  # a config file may have an argument
        if re.match(r"(experiments|launch|examples|deploy|docs)/|requirements[\w-]*\.txt$", path):
            assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (experiments\S+|launch\.[a-z]\S+)", command):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    if target := re.match(r"make ([\w-]+)", command):
        assert re.search(rf"^{target[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target[1]


def dockerfile(path: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined)]


@pytest.mark.parametrize("name", ["serve", "train"])
def test_images_copy_what_exists_and_start_a_main(name):
    instructions = dockerfile(ROOT / "deploy" / f"{name}.Dockerfile")
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    for source in (word for kind, rest in instructions if kind == "COPY" for word in rest.split()[:-1]):
        assert (ROOT / source).exists() and f"!{source}" in sent, source
    assert [kind for kind, _ in instructions].index("USER") < [kind for kind, _ in instructions].index("CMD")
    started = [word for kind, rest in instructions if kind in ("ENTRYPOINT", "CMD") for word in json.loads(rest)]
    mains = calls(" ".join(started))
    assert [main for main, _ in mains] == [name] and not check({name: [mains[0][1]]})


def test_the_compose_file_starts_the_service():
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    serve = compose["services"]["serve"]
    assert (ROOT / "deploy" / serve["build"]["context"] / serve["build"]["dockerfile"]).exists()
    mounts = {mount.split(":")[1]: mount.split(":")[0] for mount in serve["volumes"]}
    assert set(mounts) == {"/artifacts", "/logs", "/cache"} and {"logs", "cache"} == set(compose["volumes"])
    assert set(serve["secrets"]) == set(compose["secrets"]) == {"token"}  # at /run/secrets/token, as the image expects


def test_the_manifests_start_the_service():
    service, pods = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())
    assert (service["kind"], pods["kind"], pods["spec"]["replicas"]) == ("Service", "StatefulSet", 1)
    labels, spec = pods["spec"]["template"]["metadata"]["labels"], pods["spec"]["template"]["spec"]
    assert service["spec"]["selector"] == pods["spec"]["selector"]["matchLabels"] == labels
    (container,) = spec["containers"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    volumes = {volume["name"] for volume in spec["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in pods["spec"]["volumeClaimTemplates"]}
    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
    for part in (container, *spec["initContainers"]):
        assert {mount["name"] for mount in part["volumeMounts"]} <= volumes
    assert not check({"serve": [container["args"]]})
    given = dict(flag.removeprefix("--").split("=") for flag in container["args"])
    assert int(given["port"]) == container["ports"][0]["containerPort"]
    for flag in ("artifact", "log", "token_file"):
        assert any(given[flag].startswith(f"{path}/") for path in paths), flag


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_public_name(hooks):
    names = hooks.public_names()
    assert {name.split(".")[1] for name in names} == {name for name in mmrf_jax.__all__ if name[0] != "_"}
    assert {"mmrf_jax.metrics.gauc", "mmrf_jax.abtest.compare", "mmrf_jax.ope.estimate"} <= set(names)


def test_links_of_the_site_that_leave_docs(hooks):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="decisions/one.md"))

    def site(text, repo_url=None):
        return hooks.on_page_markdown(text, page, SimpleNamespace(repo_url=repo_url), None)

    assert site("[costs](../cost.md#a) [out](https://x.y/z)") == "[costs](../cost.md#a) [out](https://x.y/z)"
    assert site("[map](../../WORKSPACE.md)") == "map (`WORKSPACE.md`)"
    assert site("[WORKSPACE.md](../../WORKSPACE.md)") == "WORKSPACE.md"
    assert site("[map](../../WORKSPACE.md)", "https://h/o/r") == "[map](https://h/o/r/blob/main/WORKSPACE.md)"
    assert site("[start](../../README.md)") == "[start](../index.md)"
