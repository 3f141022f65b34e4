"""The command `mmrf`: runs one of the commands below."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import mmrf_jax
from mmrf_jax import cli, fields

#: Each command is a module of this package with a function `run`; the module's docstring is the command's help.
COMMANDS = (
    "train",
    "evaluate",
    "report",
    "compare",
    "ab-test",
    "export",
    "serve",
    "sweep",
    "configs",
    "collect",
    "check-data",
    "prepare",
    "synthesize",
    "closed-loop",
    "multiprocess",
    "benchmark",
)


def main() -> None:
    """Run `mmrf COMMAND --flags…`: the entry point of the package."""
    cli.begin()
    name, flags = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in ("--help", "-h", "help"):
        return _print(_help())
    if name == "--version":
        return _print(mmrf_jax.__version__)
    if name not in COMMANDS:
        advice = fields.nearest(name.replace("_", "-"), COMMANDS)
        print(f"error: unknown command {name!r}; {advice}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"mmrf {name}", *flags]
    sys.path.insert(0, "")  # configs and plug-ins of the current folder, as with python -m
    importlib.import_module(f"{cli.__name__}.{_module(name)}").run()


def _print(text: str) -> None:
    from mmrf_jax.cli import endings

    with endings.of_closed_pipes():
        print(text)


def _module(name: str) -> str:
    return name.replace("-", "_")


def _help() -> str:
    lines = [f"  {name:<{max(map(len, COMMANDS))}}  {_summary(name)}" for name in COMMANDS]
    first, last = "usage: mmrf COMMAND [--flag=value …]", "`mmrf COMMAND --help` explains a command and its flags."
    return "\n".join([first, "", *lines, "", last])


def _summary(name: str) -> str:
    """Return the first clause of a command's help, read without importing it."""
    text = ast.get_docstring(ast.parse((Path(__file__).parent / f"{_module(name)}.py").read_text()))
    return re.split(r"[.:;] ", (text or "").split("\n")[0])[0].rstrip(".")
