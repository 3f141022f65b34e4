"""What the mains share: flags, the quick overlay, one line for an error, the environment before JAX starts."""

from __future__ import annotations

import ast
import ctypes
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# glibc's malloc gives large blocks back to the system, so each step of a program faults its temporaries in anew; an
# update of the main job takes 38 ms with blocks kept and 52 ms without. M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD:
if hasattr(ctypes.CDLL(None), "mallopt"):
    for _parameter, _bytes in ((-3, 2**31 - 1), (-1, 2**31 - 1), (-2, 2**30)):
        ctypes.CDLL(None).mallopt(_parameter, _bytes)

# Virtual CPU devices deadlock on few cores unless XLA believes in more of them; it reads this when JAX starts.
if int(os.environ.get("JAX_NUM_CPU_DEVICES") or 1) > 1:
    os.environ.setdefault("NPROC", str(max(16, 2 * int(os.environ["JAX_NUM_CPU_DEVICES"]))))

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from launch import endings
from mmrf_jax.checkpointing.manager import CheckpointError
from mmrf_jax.metrics import files, progress
from mmrf_jax.metrics.progress import say
from mmrf_jax.parallel import ending, multihost, preemption
from mmrf_jax.parallel import mesh as par
from mmrf_jax.training import workdir as wd

USER_ERRORS = (ValueError, OSError, CheckpointError, FloatingPointError)
WORLD = files.shipped("experiments/world.py")  # what messages recommend

_MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "This is one of several processes that SLURM, Open MPI, Cloud TPU or Kubernetes has started."
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of the first process, where none has.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
_PARENT = flags.DEFINE_integer("parent", None, "Number of the process with which this one ends, as by SIGTERM.")


def run(main: Callable[[], None], several: bool = False, resumes: bool = False, **kwargs) -> None:
    """absl's `app.run`; an error of the user's is one line on stderr and exit code 2.

    Args:
      several: whether the main can be one of several processes.
      resumes: whether the same command goes on where a signal has stopped it: then the exit code says so; else the
        process ends by the signal.
    """

    def parse(argv: list[str]) -> list[str]:
        argv = [_with_home(argument) for argument in argv]
        _check_config_file(argv)
        try:
            rest = flags.FLAGS(argv)
        except flags.Error as error:
            _fail(str(error).split("\n")[0])
        except (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
            _fail(_one_line(error))
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}; flags are --name=value")
        return rest

    def guarded(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        logging.use_absl_handler()
        # A save that fails is an error of ours, in a line; orbax would also print where in its threads it failed.
        logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
        # A second start of the same program then compiles nothing anew, small programs included.
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mmrf_jax" / "xla"
            jax.config.update("jax_compilation_cache_dir", str(cache))
        if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        if _PARENT.value is not None:
            threading.Thread(target=_end_with, args=(_PARENT.value,), daemon=True).start()
        try:
            _join(several)
            with preemption.watching(at_once=True) as watch, progress.interruptible(watch.check):
                main()
        except multihost.FailedElsewhere:
            _leave(2)
        except preemption.Preempted as stopped:
            _stop(stopped, resumes)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            _fail(f"lost another process of the run ({_one_line(error)[:200]}); start all of them again", 1)
        except USER_ERRORS as error:
            if isinstance(error, BrokenPipeError) and endings.is_closed_pipe():
                raise
            _fail(_one_line(error))

    with endings.of_closed_pipes():
        app.run(guarded, flags_parser=parse, **kwargs)


def _stop(stopped: preemption.Preempted, resumes: bool) -> None:
    """Ends a main that a signal has stopped."""
    say(f"{stopped}; the same command goes on" if resumes else str(stopped))
    if not resumes:
        sys.stdout.flush()
        ending.end_by(stopped.number)
    if jax.distributed.is_initialized():  # the others of the run are waited for
        sys.exit(preemption.EXIT_CODE)
    _leave(preemption.EXIT_CODE)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, AttributeError | KeyError):  # of ml_collections
        text = text.strip('"')
        return f"unknown config field {text}; the fields are those of the config file"
    if isinstance(error, OSError) and error.filename is not None:
        fix = "free some space" if error.errno == errno.ENOSPC else "name another place"
        return f"{error.filename}: {error.strerror}; {fix}"
    return text


def _check_config_file(argv: list[str]) -> None:
    """Says what is wrong with the file of --config; the flag itself says it less clearly, or with a traceback."""
    value = _value(argv, "config")
    if value is None:
        return
    path = Path(value.split(":")[0])
    if ":" in value and Path(value).exists():
        _fail(f"--config={value} holds a colon, which ends the name of a config file; rename the file or folder")
    try:
        tree = ast.parse(path.read_text())
    except OSError as error:
        _fail(f"--config={path} cannot be read ({error.strerror}); use {WORLD} or another experiment")
    except (SyntaxError, ValueError) as error:
        _fail(f"--config={path} is no Python file ({error}); correct it or use {WORLD}")
    if not any(getattr(node, "name", "") == "get_config" for node in tree.body):
        _fail(f"--config={path} does not define get_config(); see {WORLD}")


def _with_home(argument: str) -> str:
    """--config=~/… as other paths are taken; its own flag takes it literally."""
    name, _, value = argument.partition("=")
    if name not in ("--config", "-config"):
        return argument
    try:
        return f"{name}={files.user_path(value, name)}"
    except ValueError as error:
        _fail(str(error))


def _value(argv: list[str], flag: str) -> str | None:
    """The value of a flag as --flag=value or --flag value, before absl has parsed anything."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            return value if equals else following
    return None


def _join(several: bool) -> None:
    """Makes this process one of several, where the flags say so.

    Raises:
      ValueError: where the main does all of its work in one process.
    """
    given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if not _MULTIHOST.value and given == (None, None, None):
        return
    if not several:
        raise ValueError(
            "this main works in one process; leave out --multihost, --coordinator_address, --num_processes and "
            "--process_id, which are of launch.train, launch.ab_test and launch.collect"
        )
    multihost.join(*given)
    if not par.is_primary():
        progress.mute()


def _end_with(parent: int) -> None:
    """Stops this process when its parent has gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)


def _fail(message: str, code: int = 2) -> NoReturn:
    with endings.of_closed_pipes():
        print(f"error: {message}", file=sys.stderr)
        _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends at once: threads of checkpointing, compilation or other processes must not hold up or change the code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_output(flag: str, path: Path) -> None:
    """Refuses, before any work is done, an output whose folder cannot be made or written to.

    Raises:
      ValueError: naming the flag.
    """
    if path.is_dir():
        raise ValueError(f"--{flag}={path} is a folder; name a file")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--{flag}={path} cannot be written: {folder} is no folder that you may write to")


def define_path(name: str, default: str | None, text: str, required: bool = False) -> flags.FlagHolder[Path]:
    """A flag whose value is a path, as `files.user_path` takes it."""
    return flags.DEFINE(_PathParser(name), name, default, text, required=required)  # type: ignore[return-value]


class _PathParser(flags.ArgumentParser):
    """Makes a path of what is given for a flag."""

    def __init__(self, name: str):
        self._name = name

    def parse(self, argument: str) -> Path:
        return files.user_path(str(argument), f"--{self._name}")

    def flag_type(self) -> str:
        return "path"


def define_config(default: str | None = None):
    """The --config flag: a Python file with get_config(); fields are set by --config.a.b=value."""
    return config_flags.DEFINE_config_file(
        "config", default and files.shipped(default), "Experiment file, such as experiments/world.py.", lock_config=True
    )


def check_world(config) -> None:
    """Refuses, before any data is read, a config without a simulator to act in.

    Raises:
      ValueError: naming its source.
    """
    if config.simulator == "feedback":
        return
    if config.source != "world" or "world" not in config:
        raise ValueError(
            f"this needs the world, not config.source={config.source!r}; use --config={WORLD}, or "
            "--config.simulator=feedback with --config.simulator_checkpoint=RUN"
        )


def define_run_config(argv: list[str]):
    """A --config flag that starts from the config of the run named by --workdir; overrides go on top."""
    workdir = _value(argv, "workdir")
    try:
        values = {} if workdir is None else wd.read_config(files.user_path(workdir, "--workdir"))
        return config_flags.DEFINE_config_dict(
            "config", ml_collections.ConfigDict(values), "The run's config.", lock_config=True
        )
    except (*USER_ERRORS, AttributeError, KeyError) as error:
        _fail(_one_line(error))


def resolve(flag) -> ml_collections.ConfigDict:
    """The config of a flag with the quick overlay put beneath the explicit overrides."""
    config = flag.value
    if config is None:
        raise ValueError(f"no config; use --config={WORLD}")
    if config.quick and "when_quick" in config:
        explicit = config_flags.get_override_values(flags.FLAGS[flag.name])
        config.update(config.when_quick)
        for name, value in explicit.items():
            config.update_from_flattened_dict({name: value})
    if config.quick:  # its time goes into compilation, not into what is compiled
        jax.config.update("jax_disable_most_optimizations", True)
    return ml_collections.ConfigDict({name: v for name, v in config.to_dict().items() if name != "when_quick"})
