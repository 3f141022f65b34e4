"""Help, and what is said of wrong flags and config fields: our own words, before JAX is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import world

ROOT = Path(__file__).resolve().parents[2]
MAINS = sorted(path.stem for path in (ROOT / "launch").glob("[a-z]*.py"))
HEAVY = {"jax", "polars", "orbax", "matplotlib"}  # each takes a good part of a second

#: Runs mains one after another, each in a separate child that inherits what all of them import. Each line of the
#: input is a main and its flags; what it prints, its exit code and the heavy modules it has imported are a JSON line.
RUN = """
import contextlib, io, json, os, runpy, sys
import mmrf_jax.cli.parsing
for line in sys.stdin:
    name, *argv = json.loads(line)
    read, write = os.pipe()
    if not (child := os.fork()):
        os.dup2(write, 1), os.dup2(write, 2)
        sys.argv, code = [f"launch/{name}.py", *argv], 0
        try:
            runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
        print("\\nheavy:", *(set(sys.modules) & %r), flush=True)
        os._exit(code)
    os.close(write)
    said = open(read, errors="replace").read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said]), flush=True)
"""


@pytest.fixture(scope="module")
def mains():
    """Gives (exit code, output) of `launch.NAME` with flags."""
    with subprocess.Popen(
        [sys.executable, "-c", RUN % HEAVY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    ) as process:

        def start(name: str, *flags: object) -> tuple[int, str]:
            print(json.dumps([name, *map(str, flags)]), file=process.stdin, flush=True)
            code, said = json.loads(process.stdout.readline())
            return code, said

        yield start
        process.stdin.close()


@pytest.mark.parametrize("flag", ["--help", "--helpfull", "-h"])
@pytest.mark.parametrize("name", MAINS)
def test_help_of_every_main(name, flag, mains):
    """It ends with 0, tells what the main does and its flags, and nothing heavy is imported for it."""
    code, said = mains(name, flag)
    source = (ROOT / "mmrf_jax" / "cli" / f"{name}.py").read_text()
    first = source.split('"""')[1].split("\n")[0]
    own = [part.split('"')[1] for part in source.replace("(\n    ", "(").split("DEFINE_")[1:]]
    own += [part.split('"')[1] for part in source.split("common.define_path(")[1:]]
    own += ["config"] * ("common.define_config(" in source or "define_run_config(" in source)
    assert code == 0, said
    assert first in said and (own or name == "configs")
    for flag in own:
        assert f"--{flag}:" in said or f"--[no]{flag}:" in said, said
    assert said.endswith("heavy:\n"), said[-100:]


WORLD = "--config=experiments/world.py"
TRAIN = ("train", WORLD, "--workdir={tmp}/run")


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            (*TRAIN, "--config.feedback.lerning_rate=0.1"),
            "unknown config field 'feedback.lerning_rate'; did you mean learning_rate or table_learning_rate?",
        ),
        ((*TRAIN, "--config.agent.polyak=0.1"), "unknown config field 'agent.polyak'; did you mean agents?"),
        ((*TRAIN, "--noconfig.quik"), "unknown config field 'quik'; did you mean quick?"),
        ((*TRAIN, "--config.train.batch.size=1"), "unknown config field 'train.batch.size'; it has no fields"),
        ((*TRAIN, "--config.train.batch=abc"), "--config.train.batch=abc is not a whole number"),
        ((*TRAIN, "--config.train.batch=1.5"), "--config.train.batch=1.5 is not a whole number"),
        ((*TRAIN, "--config.agents.polyak=x"), "--config.agents.polyak=x is not a number"),
        ((*TRAIN, "--config.agents.max_rows=x"), "--config.agents.max_rows=x is not a whole number"),
        ((*TRAIN, "--config.quick=perhaps"), "--config.quick=perhaps is not True or False"),
        ((*TRAIN, "--config.train=5"), "--config.train=5 is not a field; set those that it has"),
        ((*TRAIN, "--config.ab_test.arms=(1,)"), "config.ab_test.arms is (1,); use for each a text"),
        ((*TRAIN, "--config.train.batch"), "--config.train.batch has no value; write --config.train.batch=VALUE"),
        ((*TRAIN, "--config.agents.temperature=nan"), "config.agents.temperature is nan; use a number above 0"),
        ((*TRAIN, "more"), "unexpected argument 'more'; flags are --name=value"),
        (("train", WORLD, "--wrkdir=x"), "unknown flag --wrkdir; did you mean --workdir?"),
        (("train", WORLD, "--zzz=x"), "unknown flag --zzz; --help lists them"),
        (("train", WORLD), "--workdir is missing; give it: Run folder"),
        (("train", WORLD, "--workdir"), "--workdir has no value; write --workdir=VALUE"),
        (("train", "--workdir=x", "--config.seed=1"), "--config.seed needs --config=NAME before it"),
        (("train", "--config.seed=1", WORLD, "--workdir=x"), "--config.seed=1 stands before --config=NAME"),
        (("train", "--config={tmp}/none.py", "--workdir=x"), "none.py cannot be read (No such file or directory)"),
        (("synthesize", "--rows=abc", "--out={tmp}/x"), "--rows=abc is not a whole number of 1 or more"),
        (("synthesize", "--rows=0", "--out={tmp}/x"), "--rows=0 is not a whole number of 1 or more"),
        (("synthesize", "--rows=1", "--variant=5k", "--out={tmp}/x"), "--variant=5k is not one of pure, 1k, 27k"),
        (("serve", "--artifact={tmp}", "--port=99999"), "--port=99999 is not a whole number in [0, 65535]"),
        (("serve", "--artifact={tmp}", "--temperature=nan"), "--temperature=nan is not finite; use a number"),
        (("multiprocess", "--grace_seconds=inf", "--", "-m", "x"), "--grace_seconds=inf is not finite; use a number"),
        (("multiprocess",), "no command; use -- -m mmrf_jax.cli train"),
        (("evaluate", "--workdir={tmp}/given", "--config=world"), "--config is that of the run; set its fields by"),
        (("train", "--config=wrld", "--workdir=x"), "--config=wrld is no packaged config; did you mean world?"),
        (("evaluate", "--workdir={tmp}/none"), "none is not a run folder: it has no config.json"),
        (("evaluate", "--workdir={tmp}/given", "--config.sed=1"), "field 'sed'; did you mean seed or seeds?"),
        (("evaluate", "--workdir={tmp}/given", "--config.train.batch=0"), "use --config.train.batch=1 or more"),
        (("prepare", "--source=x", "--out=y", "--config.data.slat=1"), "'data.slat'; did you mean slate?"),
        (
            ("sweep", "--config=experiments/table_ablation.py", "--out=x", "--config.seeds=0"),
            "--config.seeds=1 or more",
        ),
        (("closed_loop", "--workdir=x", "--config.world.candidates=0"), "--config.world.candidates=1 or more"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else None,
)
def test_a_wrong_flag_or_field_is_said_in_our_words(command, line, mains, tmp_path):
    """In one line, before anything is written and anything heavy is imported."""
    (tmp_path / "given").mkdir()
    run = {name: value for name, value in world.get_config().to_dict().items() if name != "when_quick"}
    (tmp_path / "given" / "config.json").write_text(json.dumps(run))
    code, said = mains(command[0], *(part.replace("{tmp}", str(tmp_path)) for part in command[1:]))
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert line in said
    assert [path.name for path in tmp_path.iterdir()] == ["given"]
