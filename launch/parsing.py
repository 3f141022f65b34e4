"""Parsing of the mains' flags and config fields, with one-line error messages. It does not import JAX."""

from __future__ import annotations

import ast
import errno
import math
import os
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from launch import endings
from mmrf_jax import fields
from mmrf_jax.io import files
from mmrf_jax.training import configs

WORLD = files.shipped("experiments/world.py")  # the config that messages recommend

_FIXES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.ENOENT: "check the path",
    errno.EACCES: "use one that you may read and write",
    errno.EPERM: "use one that you may read and write",
    errno.EROFS: "use one that you may read and write",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENAMETOOLONG: "use a shorter name",
}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "True or False"}


def parse(argv: Sequence[str], positional: bool = False) -> list[str]:
    """Parse a main's flags, for `absl.app.run`; an error is one line on stderr and exit code 2.

    Args:
      argv: the command line.
      positional: whether positional arguments are allowed.
    """
    given = ["--help" if argument == "-h" else _with_home(argument) for argument in argv]
    try:
        rest = _parse(given)
    except SystemExit:  # absl has printed its help and exits with 1
        sys.exit(0)
    if len(rest) > 1 and not positional:
        fail(f"unexpected argument {rest[1]!r}; flags are --name=value")
    return rest


def _parse(argv: list[str]) -> list[str]:
    if not {argument.lstrip("-") for argument in argv} & {"help", "helpfull", "helpshort", "helpxml"}:
        _check_config_file(argv)
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and (config := flags.FLAGS["config"].value) is not None:
            configs.validate(config.to_dict())
    except BrokenPipeError:  # the reader of the help is gone
        raise
    except flags.Error as error:
        fail(_of_flag(error))
    except (AttributeError, KeyError) as error:
        fail(_unknown_field(_config_of(value_of(argv, "config") or ""), argv) or one_line(error))
    except (TypeError, ValueError, OSError) as error:
        fail(one_line(error))
    for name, value in flags.FLAGS.flag_values_dict().items():
        if isinstance(value, float) and not math.isfinite(value) and not name.startswith("config."):
            fail(f"--{name}={value} is not finite; use a number")
    return rest


def define_config_file(default: str | None, text: str) -> flags.FlagHolder:
    """Define the --config flag of a file with get_config(); a default is read here, with the overridden fields."""
    try:
        return config_flags.DEFINE_config_file("config", default, text, lock_config=True)
    except flags.Error as error:
        fail(_of_flag(error))
    except (AttributeError, KeyError) as error:
        fail(_unknown_field(_config_of(str(default)), sys.argv) or one_line(error))


def define_config_dict(config: Any, text: str) -> flags.FlagHolder:
    """Define the --config flag of an existing config."""
    try:
        return config_flags.DEFINE_config_dict("config", config, text, lock_config=True)
    except flags.Error as error:
        fail(_of_flag(error))
    except (AttributeError, KeyError) as error:
        fail(_unknown_field(config, sys.argv) or one_line(error))


def _unknown_field(config: Any, argv: Sequence[str]) -> str | None:
    """Return the message for the first --config.FIELD that a config does not have; None if it has them all."""
    names = configs.flat(config.to_dict())
    for argument in argv:
        if found := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            name = found[1]
            if not any(other == name or other.startswith(f"{name}.") for other in names):
                return configs.unknown(name, names)
    return None


def one_line(error: Exception) -> str:
    """Format a user error as one line, with a fix if the system's message has none."""
    if isinstance(error, OSError) and error.filename is not None:
        fix = _FIXES.get(error.errno or 0, "name another place")
        return f"{error.filename}: {error.strerror}; {fix}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())


def fail(message: str, code: int = 2) -> NoReturn:
    """Exit with one line on stderr."""
    with endings.of_closed_pipes():
        print(f"error: {message}", file=sys.stderr)
        leave(code)


def leave(code: int) -> NoReturn:
    """Exit at once: threads of checkpointing, compilation or other processes must not delay it or change its code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag given as --flag=value or --flag value, before absl parses anything."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            return value if equals else following
    return None


def _of_flag(error: flags.Error) -> str:
    """Translate absl's message about a wrong flag."""
    if isinstance(error, flags.UnrecognizedFlagError):
        if error.flagname.startswith("config."):
            return f"--{error.flagname} needs --config=FILE before it, such as --config={WORLD}"
        return f"unknown flag --{error.flagname}; {_nearest_flag(error.flagname)}"
    text = str(error).split("\n")[0]
    if found := re.match(r"flag --(\S+?)=None: Flag --\S+ must have a value", text):
        return f"--{found[1]} is missing; give it: {_first_line(flags.FLAGS[found[1]].help)}"
    if found := re.match(r"flag --(\S+?)=(.*?): ", text):
        name, value = found[1], found[2]
        if name in flags.FLAGS:
            return f"--{name}={value} is not {_wanted(flags.FLAGS[name])}"
    if found := re.match(r"Missing value for flag -*(\S+)", text):
        return f"--{found[1]} has no value; write --{found[1]}=VALUE"
    if found := re.match(r"Found (\S+) in argv before a value for --config", text):
        return f"{found[1]} stands before --config=FILE; put --config=FILE first"
    return text


def _nearest_flag(name: str) -> str:
    known = {other for other in flags.FLAGS if "." not in other}
    near = fields.nearest(name, known)
    if near.startswith("did you mean"):
        return near.replace("mean ", "mean --").replace(" or ", " or --")
    return "--help lists them"


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].rstrip(".")


def _wanted(flag: flags.Flag) -> str:
    """Describe the values that a flag accepts."""
    parser: Any = flag.parser
    if type(parser).__name__ == "_ConfigDictParser":
        return f"a field; set those that it has, such as --{flag.name}.FIELD=VALUE"
    if (names := getattr(parser, "enum_values", None)) is not None:
        return f"one of {', '.join(names)}"
    kind = _KINDS.get(parser.flag_type(), f"what --{flag.name} takes ({parser.flag_type()})")
    low, high = getattr(parser, "lower_bound", None), getattr(parser, "upper_bound", None)
    if low is not None and high is not None:
        return f"{kind} in [{low}, {high}]"
    return kind if low is None else f"{kind} of {low} or more"


def _config_of(file: str) -> Any:
    """Load the config of a file as --config names it, such as FILE or FILE:ARGUMENT."""
    path, _, argument = file.partition(":")
    make = runpy.run_path(path)["get_config"]
    return make(argument) if argument else make()


def _check_config_file(argv: Sequence[str]) -> None:
    """Fail with a clear message if the file of --config is invalid; the flag's own is less clear, or a traceback."""
    value = value_of(argv, "config")
    if value is None:
        return
    path = Path(value.split(":")[0])
    if ":" in value and Path(value).exists():
        fail(f"--config={value} holds a colon, which ends the name of a config file; rename the file or folder")
    try:
        tree = ast.parse(path.read_text())
    except OSError as error:
        fail(f"--config={path} cannot be read ({error.strerror}); use {WORLD} or another experiment")
    except (SyntaxError, ValueError) as error:
        fail(f"--config={path} is no Python file ({error}); correct it or use {WORLD}")
    if not any(getattr(node, "name", "") == "get_config" for node in tree.body):
        fail(f"--config={path} does not define get_config(); see {WORLD}")


def _with_home(argument: str) -> str:
    """Expand ~ in --config=~/… as in other paths; the flag itself would take it literally."""
    name, _, value = argument.partition("=")
    if name not in ("--config", "-config"):
        return argument
    try:
        return f"{name}={files.user_path(value, name)}"
    except ValueError as error:
        fail(str(error))
