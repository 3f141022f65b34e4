"""Code shared by the mains: flags, the quick overlay, one-line errors, the environment before JAX starts."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

# glibc's malloc returns large blocks to the system, so that every step page-faults its temporaries again: an update of
# the main job takes 52 ms, but 38 ms if blocks are retained. M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD:
if hasattr(ctypes.CDLL(None), "mallopt"):
    for _parameter, _bytes in ((-3, 2**31 - 1), (-1, 2**31 - 1), (-2, 2**30)):
        ctypes.CDLL(None).mallopt(_parameter, _bytes)

# Virtual CPU devices deadlock on few cores unless XLA assumes more of them; it reads NPROC when JAX starts.
if (_devices := os.environ.get("JAX_NUM_CPU_DEVICES", "")).isdecimal() and int(_devices) > 1:
    os.environ.setdefault("NPROC", str(max(16, 2 * int(_devices))))

# JAX and everything that needs it is imported after flag parsing, so that --help and flag errors appear at once.
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from mmrf_jax import plugins
from mmrf_jax.cli import endings, parsing
from mmrf_jax.cli.parsing import WORLD
from mmrf_jax.io import extras, files, progress, storage
from mmrf_jax.io.progress import say
from mmrf_jax.parallel import ending
from mmrf_jax.training import configs, run_folder, startup

_NAMED_WITHIN = 10.0  # seconds from an error of the network until the heartbeats have named a process
_LIBRARIES = ("orbax", "etils", "matplotlib")

_MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "This is one of several processes that SLURM, Open MPI, Cloud TPU or Kubernetes has started."
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of the first process, where none has.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
_JOIN = flags.DEFINE_float("join_seconds", 300.0, "To wait for the other processes of the run.", lower_bound=1.0)
_STALL = flags.DEFINE_float(
    "stall_seconds", 1_800.0, "Without progress of any process, until the run ends because one hangs.", lower_bound=1.0
)
_PARENT = flags.DEFINE_integer("parent", None, "Number of the process with which this one ends, as by SIGTERM.")
_SHARED = [flag.name for flag in flags.FLAGS.get_flags_for_module(__name__)]
_IMPORT = flags.DEFINE_list("import", [], "Modules that register methods, policies or environments, imported first.")


def run(
    main: Callable[..., None],
    several: bool = False,
    resumes: bool = False,
    devices: bool = True,
    positional: bool = False,
    **kwargs,
) -> None:
    """Run a main with absl's `app.run`; a user error is one line on stderr and exit code 2.

    Args:
      several: whether the main can be one of several processes.
      resumes: whether the same command resumes after a signal has stopped it; if so, the exit code says so, otherwise
        the process ends by the signal.
      devices: whether the main computes on JAX's devices; if there are none, it fails before any work is done.
      positional: whether the main takes arguments that are no flags, as a list.
    """

    def guarded(argv: list[str]) -> None:
        try:
            _quieten()
            _run(functools.partial(main, argv[1:]) if positional else main, several, resumes, devices)
        except (ValueError, OSError, FloatingPointError, extras.MissingExtra) as error:
            if isinstance(error, BrokenPipeError) and endings.is_closed_pipe():
                raise
            parsing.fail(parsing.one_line(error))

    parsing.explain(main.__module__, hidden=("parent",) if several else _SHARED)
    with endings.of_closed_pipes():
        app.run(guarded, flags_parser=functools.partial(parsing.parse, positional=positional), **kwargs)


def _run(main: Callable[[], None], several: bool, resumes: bool, devices: bool) -> None:
    startup.start_jax()
    gc.freeze()  # tracing makes millions of objects: exclude the imported ones from garbage collection
    gc.set_threshold(100_000, 50, 1_000)
    import jax

    from mmrf_jax.checkpointing.manager import CheckpointError
    from mmrf_jax.parallel import heartbeat, multihost, preemption

    if _PARENT.value is not None:
        threading.Thread(target=_end_with, args=(_PARENT.value,), daemon=True).start()
    try:
        _join(several)
        with preemption.watching(at_once=True) as watch, progress.interruptible(watch.check):
            if devices:
                check_devices()
                multihost.meet()
            plugins.load(_IMPORT.value)
            main()
        multihost.leave()
    except heartbeat.ProcessLost as lost:
        _end_lost(str(lost))
    except multihost.FailedElsewhere:
        parsing.leave(2)
    except preemption.Preempted as stopped:
        _stop(stopped.number, str(stopped), resumes)
    except CheckpointError as error:
        parsing.fail(parsing.one_line(error))
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        said = multihost.lost(_NAMED_WITHIN) or f"another process of the run is lost ({parsing.one_line(error)[:200]})"
        _end_lost(said)


def _end_lost(line: str) -> None:
    """End this process because another one of the run is lost, whichever thread finds out."""
    parsing.fail(f"{line}; start all processes again", 1)


def _quieten() -> None:
    """Hide library messages that are not meant for the user."""
    logging.set_verbosity(logging.WARNING)
    logging.use_absl_handler()
    # An error in a library becomes our one-line error; its warnings concern its own settings.
    logging.get_absl_handler().addFilter(_is_ours)
    for library in _LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")


def _is_ours(record) -> bool:
    of_library = any(f"{os.sep}{library}{os.sep}" in record.pathname for library in _LIBRARIES)
    return not of_library or (record.levelname in ("ERROR", "CRITICAL") and not record.exc_info)


def check_devices() -> None:
    """Refuse to start if JAX has no device.

    Raises:
      ValueError: naming the requested platforms.
    """
    import jax

    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts without a message if its build lacks the platform
        asked = os.environ.get("JAX_PLATFORMS")
        reason = parsing.one_line(error).split(" (set JAX_PLATFORMS")[0] or "this build of JAX does not know it"
        what = f"JAX_PLATFORMS={asked} cannot be used" if asked else "JAX has no device"
        raise ValueError(f"{what}: {reason}; use JAX_PLATFORMS=cpu") from error


def _stop(number: int, text: str, resumes: bool) -> None:
    """End a main that a signal has stopped."""
    import jax

    from mmrf_jax.parallel import multihost, preemption

    say(f"{text}; the same command resumes" if resumes else text)
    if not resumes:
        sys.stdout.flush()
        ending.end_by(number)
    if jax.distributed.is_initialized():  # wait for the other processes of the run
        multihost.leave()
        sys.exit(preemption.EXIT_CODE)
    parsing.leave(preemption.EXIT_CODE)


def _join(several: bool) -> None:
    """Make this process one of several, if the flags say so.

    Raises:
      ValueError: if the main works in a single process.
    """
    from mmrf_jax.parallel import heartbeat, multihost

    given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if not _MULTIHOST.value and given == (None, None, None):
        return
    if not several:
        raise ValueError(
            "this main works in one process; leave out --multihost, --coordinator_address, --num_processes and "
            "--process_id, which are of train, ab-test and collect"
        )
    limits = heartbeat.Limits(join=_JOIN.value, stalled=_STALL.value)
    multihost.join(*given, moved=progress.moves, end=_end_lost, limits=limits)
    if not multihost.is_primary():
        progress.mute()


def _end_with(parent: int) -> None:
    """Stop this process when its parent has ended, for whatever reason."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)


def check_output(flag: str, path: Path) -> None:
    """Refuse, before any work is done, an output whose folder cannot be created or written to.

    Raises:
      ValueError: naming the flag.
    """
    if path.is_dir():
        raise ValueError(f"--{flag}={path} is a folder; name a file")
    if storage.is_remote(path):
        files.check_writable(path.parent, f"--{flag}")
        return
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--{flag}={path} cannot be written: {folder} is no folder that you may write to")


def define_path(name: str, default: str | None, text: str, required: bool = False) -> flags.FlagHolder[Path]:
    """Define a flag whose value is a path, parsed by `files.user_path`."""
    return flags.DEFINE(_PathParser(name), name, default, text, required=required)  # type: ignore[return-value]


class _PathParser(flags.ArgumentParser):
    """Parses a flag's value as a path."""

    def __init__(self, name: str):
        self._name = name

    def parse(self, argument: str) -> Path:
        return files.user_path(str(argument), f"--{self._name}")

    def flag_type(self) -> str:
        return "path"


def define_config(default: str | None = None):
    """Define the --config flag: a name for `mmrf_jax.configs.load`; --config.a.b=value sets fields."""
    text = "A packaged config (`mmrf configs` lists them), a file with get_config(), or MODULE:FUNCTION."
    return parsing.define_config(default, text)


def check_world(config) -> None:
    """Refuse, before any data is read, a config without a simulator.

    Raises:
      ValueError: naming its source.
    """
    if config.simulator == "feedback":
        return
    if config.source != "world":
        raise ValueError(
            f"this needs the world, not config.source={config.source!r}; use --config={WORLD}, or "
            "--config.simulator=feedback with --config.simulator_checkpoint=RUN"
        )


def define_run_config(argv: list[str]):
    """Define a --config flag that starts from the config of the run in --workdir and applies overrides."""
    workdir = parsing.value_of(argv, "workdir")
    try:
        values = {} if workdir is None else run_folder.read_config(files.user_path(workdir, "--workdir"))
    except (ValueError, OSError) as error:
        parsing.fail(parsing.one_line(error))
    text = "Fields that are not to be those of the run: --config.FIELD=VALUE."
    return parsing.define_config_dict(ml_collections.ConfigDict(values), text)


def resolve_run(flag) -> configs.Run:
    """Return `resolve` of a run's config, typed."""
    return configs.run_of(resolve(flag).to_dict())


def imports() -> list[str]:
    """Return --import as a flag for the commands that this one starts."""
    return [f"--import={','.join(_IMPORT.value)}"] if _IMPORT.value else []


def resolve(flag) -> ml_collections.ConfigDict:
    """Return the config of a flag, with the quick overlay applied below the explicit overrides.

    Raises:
      ValueError: if there is no config, or the overlay makes fields inconsistent.
    """
    config = flag.value
    if config is None:
        raise ValueError(f"no config; use --config={WORLD}")
    resolved = configs.resolve_config(config.to_dict(), config_flags.get_override_values(flags.FLAGS[flag.name]))
    if config.quick:  # its time is compilation, so optimise less
        from mmrf_jax.parallel import programs

        programs.compile_quickly()
    return ml_collections.ConfigDict(resolved)
