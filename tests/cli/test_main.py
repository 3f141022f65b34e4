"""The command `mmrf`: its table of commands, unknown ones, and the fields of a config."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmrf_jax
from mmrf_jax import cli, configs, fields
from mmrf_jax.cli import describe, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def mmrf(monkeypatch, capsys):
    """Runs `mmrf` with arguments in this process, up to the command itself: (exit code, stdout, stderr)."""
    monkeypatch.setattr(cli, "begin", lambda: None)  # it is for the whole process

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmrf", *arguments])
        code = 0
        try:
            main.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return run


def test_the_table_is_the_modules_and_the_scripts():
    """Every command has its module with a docstring, and a script of the checkout that does no more than run it."""
    scripts = {path.stem for path in (ROOT / "launch").glob("[a-z]*.py")}
    modules = {name.replace("-", "_") for name in main.COMMANDS}
    assert modules == scripts
    for name in sorted(modules):
        source = (ROOT / "mmrf_jax" / "cli" / f"{name}.py").read_text()
        assert re.search(rf"\n *mmrf {name.replace('_', '-')} ?", source) and "\ndef run()" in source
    for name in sorted(scripts):
        assert (ROOT / "launch" / f"{name}.py").read_text().endswith(f'if __name__ == "__main__":\n    {name}.run()\n')


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(arguments, mmrf):
    code, said, error = mmrf(*arguments)
    assert code == 0 and not error
    lines = [line.split(maxsplit=1) for line in said.splitlines() if line.startswith("  ")]
    assert [line[0] for line in lines] == list(main.COMMANDS) and all(len(line[1]) > 10 for line in lines)
    assert ["train", "Train a ranker and write its run folder"] in lines


def test_version(mmrf):
    assert mmrf("--version") == (0, f"{mmrf_jax.__version__}\n", "")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("trian", "error: unknown command 'trian'; did you mean train?\n"),
        ("ab_tests", "error: unknown command 'ab_tests'; did you mean ab-test?\n"),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest(name, line, mmrf):
    assert mmrf(name) == (2, "", line)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    script = "import sys; from mmrf_jax.cli import main\ntry:\n    main.main()\n"
    script += "finally:\n    print('jax' in sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", script, *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_commands_answer_without_jax(tmp_path):
    """In a folder without the checkout: help, the list of configs, and a config's fields."""
    for arguments, first in (
        (("train", "--help"), "Train a ranker and write its run folder."),
        (("configs",), "kuairand  MMRF's agents on real logs"),
        (("train", "--config=world", "--describe"), "--config.ab_test.arms=('production', 'random',"),
    ):
        done = run(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "False\n") and done.stdout.startswith(first), done
        if "--help" in arguments:
            assert "\n  mmrf train --config=world" in done.stdout and "\nmmrf train:\n" in done.stdout


def test_configs_of_the_current_folder_are_found(tmp_path):
    imports = "from mmrf_jax.training import config_sections, configs"
    source = f"{imports}\n\n\ndef small():\n    return configs.Run(train=config_sections.Train(batch=8))"
    (tmp_path / "mine.py").write_text(source)
    done = run("train", "--config=mine:small", "--describe", cwd=tmp_path)
    assert "--config.train.batch=8\n    int in [1, 2147483647]: segments of an update\n" in done.stdout, done.stderr


def test_describe_says_what_the_dataclasses_declare():
    lines = describe.describe(configs.load("world")).splitlines()
    at = lines.index("--config.train.segment=8")
    assert lines[at + 1] == "    int in [1, 2147483647]: requests of a segment"
    at = lines.index("--config.agents.ablation=none")
    assert lines[at + 1].startswith("    one of none, no_collaboration, no_augmentation, constant_negative: ")
    quick = lines.index("with --config.quick=True:")
    assert "    --config.world.num_videos=5000" in lines[quick:] and "--config.world.num_videos=100000" in lines[:quick]
    kuairand = describe.describe(configs.load("kuairand"))
    assert "--config.alternation.rounds=1\n" in kuairand and "--config.world." not in kuairand


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (fields.field(1, "x", within="[0, 4]"), "int in [0, 4]"),
        (fields.field((0.5, 0.5), "x", within="[0, 1)"), "tuple, each float in [0, 1)"),
        (fields.field("a", "x", among=("a", "b")), "one of a, b"),
        (fields.field(True, "x"), "bool"),
    ],
)
def test_what_a_field_accepts(field, text):
    kinds = {int: "int", tuple: "tuple[float, ...]", str: "str", bool: "bool"}
    field.type = kinds[type(field.default)]
    assert describe.accepts(field) == text
    assert isinstance(field, dataclasses.Field)
