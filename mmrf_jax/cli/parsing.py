"""Parsing of the mains' flags and config fields, with one-line error messages. It does not import JAX."""

from __future__ import annotations

import errno
import math
import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from mmrf_jax import configs, fields
from mmrf_jax.cli import endings
from mmrf_jax.io import files
from mmrf_jax.training import configs as run_configs

_DESCRIBE = "List the fields of the config with default, type, range and meaning, and exit."
WORLD = "world"  # the config that messages recommend
_FILE = Path(__file__).parent / "config_file.py"  # which ml_collections reads for every --config

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
_default: Any = None  # the config of a command without --config
_named = False  # whether --config names a config
_KINDS = {"int": "a whole number", "float": "a number", "bool": "True or False"}


def parse(argv: Sequence[str], positional: bool = False) -> list[str]:
    """Parse a main's flags, for `absl.app.run`; an error is one line on stderr and exit code 2.

    Args:
      argv: the command line.
      positional: whether positional arguments are allowed.
    """
    given = ["--help" if argument == "-h" else argument for argument in argv]
    if "--describe" in given and "config" in flags.FLAGS:
        _describe(given)
    try:
        rest = _parse(given)
    except SystemExit:  # absl has printed its help and exits with 1
        sys.exit(0)
    if len(rest) > 1 and not positional:
        fail(f"unexpected argument {rest[1]!r}; flags are --name=value")
    return rest


def _describe(argv: Sequence[str]) -> NoReturn:
    """List the fields of the config and exit."""
    from mmrf_jax.cli import describe

    try:
        config = _config(argv)
    except ValueError as error:
        fail(f"--{error}")
    if config is None:
        fail(f"--describe needs a config; add --config=NAME, such as --config={WORLD}")
    print(describe.describe(config))
    sys.exit(0)


def _parse(argv: list[str]) -> list[str]:
    try:
        if not {argument.lstrip("-") for argument in argv} & {"help", "helpfull", "helpshort", "helpxml"}:
            argv = _with_config_file(argv)
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and (config := flags.FLAGS["config"].value) is not None:
            run_configs.validate_config(config.to_dict())
    except BrokenPipeError:  # the reader of the help is gone
        raise
    except flags.Error as error:
        fail(_of_flag(error))
    except (AttributeError, KeyError) as error:
        fail(_unknown_field(argv) or one_line(error))
    except (TypeError, ValueError, OSError) as error:
        fail(one_line(error))
    for name, value in flags.FLAGS.flag_values_dict().items():
        if isinstance(value, float) and not math.isfinite(value) and not name.startswith("config."):
            fail(f"--{name}={value} is not finite; use a number")
    return rest


def define_config(default: str | None, text: str) -> flags.FlagHolder:
    """Define the --config flag of a name for `configs.load`; a default is read here, with the overridden fields."""
    global _default, _named
    _default, _named = default and configs.load(default), True
    flags.DEFINE_bool("describe", False, _DESCRIBE)
    try:
        holder = config_flags.DEFINE_config_file("config", default and f"{_FILE}:{default}", text, lock_config=True)
    except flags.Error as error:
        fail(_of_flag(error))
    except (AttributeError, KeyError) as error:
        fail(_unknown_field(sys.argv) or one_line(error))
    if default:
        flags.FLAGS["config"].default_as_str = f"'{default}'"
    return holder


def config_name() -> str:
    """Return the value of --config as the user, or a default, gave it."""
    return config_flags.get_config_filename(flags.FLAGS["config"]).removeprefix(f"{_FILE}:")


def define_config_dict(config: Any, text: str) -> flags.FlagHolder:
    """Define the --config flag of an existing config."""
    global _default
    _default = config
    flags.DEFINE_bool("describe", False, _DESCRIBE)
    try:
        return config_flags.DEFINE_config_dict("config", config, text, lock_config=True)
    except flags.Error as error:
        fail(_of_flag(error))
    except (AttributeError, KeyError) as error:
        fail(_unknown_field(sys.argv) or one_line(error))


def _config(argv: Sequence[str]) -> Any:
    """Return the config that --config names, or the command's default, before fields are set; None without one."""
    name = value_of(argv, "config")
    return _default if name is None else configs.load(name.removeprefix(f"{_FILE}:"))


def _unknown_field(argv: Sequence[str]) -> str | None:
    """Return the message for the first --config.FIELD that the config does not have; None if it has them all."""
    if (config := _config(argv)) is None:
        return None
    names = files.flat(config.to_dict())
    for argument in argv:
        if found := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            name = found[1]
            if not any(other == name or other.startswith(f"{name}.") for other in names):
                return run_configs.unknown_field(name, names)
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
            return f"--{error.flagname} needs --config=NAME before it, such as --config={WORLD}"
        return f"unknown flag --{error.flagname}; {_nearest_flag(error.flagname)}"
    text = str(error).split("\n")[0]
    if found := re.match(r"flag --(\S+?)=None: Flag --\S+ must have a value", text):
        return f"--{found[1]} is missing; give it: {_first_line(flags.FLAGS[found[1]].help)}"
    if found := re.match(r"flag --(\S+?)=(.*?): ", text):
        name, value, rest = found[1], found[2], text[found.end() :]
        if rest.startswith(f"--{name}"):  # a path's parser says what is wrong
            return rest
        if name in flags.FLAGS:
            return f"--{name}={value} is not {_wanted(flags.FLAGS[name])}"
    if found := re.match(r"Missing value for flag -*(\S+)", text):
        return f"--{found[1]} has no value; write --{found[1]}=VALUE"
    if found := re.match(r"Found (\S+) in argv before a value for --config", text):
        return f"{found[1]} stands before --config=NAME; put --config=NAME first"
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


def _with_config_file(argv: Sequence[str]) -> list[str]:
    """Return the command line with the file that ml_collections reads in --config.

    Raises:
      ValueError: if there is no such config, or the command does not take one by name.
    """
    given = list(argv)
    if "config" not in flags.FLAGS:
        return given
    for i, argument in enumerate(given):
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-config"):
            continue
        at = i if equals else i + 1
        if not _named:
            raise ValueError("--config is that of the run; set its fields by --config.FIELD=VALUE")
        if at < len(given):
            value = value if equals else given[at]
            try:
                configs.load(value)
            except ValueError as error:
                raise ValueError(f"--{error}") from error
            given[at] = f"{name}={_FILE}:{value}" if equals else f"{_FILE}:{value}"
        break
    return given


def explain(module: str, hidden: Collection[str] = ()) -> None:
    """Let --help show the docstring of a command's module and its flags.

    Args:
      module: the module that defines the command.
      hidden: flags to leave out.
    """
    text = sys.modules[module].__doc__ or ""
    if not sys.argv[0].startswith("mmrf "):  # a script of the checkout
        text = re.sub(r"(?m)^( *)mmrf (\S+)", lambda found: f"{found[1]}python -m launch.{_module(found[2])}", text)
    sys.modules["__main__"].__doc__ = text
    for defining in (module, "mmrf_jax.cli.common", __name__):  # the modules whose functions define flags
        for flag in flags.FLAGS.get_flags_for_module(defining):
            if flag.name not in hidden:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _module(name: str) -> str:
    return name.replace("-", "_")
