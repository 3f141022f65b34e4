"""Defaults of the environment, set before JAX is imported. Tests of several devices start a process (`run_python`)."""

import fcntl
import gc
import itertools
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import buckets
import processes
import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Compiled programs, kept from one run of the tests to the next; of all workers and all processes that tests start.
CACHE = Path(os.environ.get("MMRF_TEST_CACHE") or ROOT / ".cache" / "xla").absolute()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in jobs in the background: what tests start would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of scikit-learn that wait for a busy core burn another
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Compiling takes longer than what is compiled; what counts work asks for the fixture `optimised`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# The emitters of fusions take three quarters of a compilation's time; code of one program in many parts a tenth.
_EMITTERS = tuple(map(int, re.findall(r"\d+", metadata.version("jax"))[:3])) < (0, 11, 1)  # whether there is a choice
_FLAGS = f"{'--xla_cpu_use_fusion_emitters=false' if _EMITTERS else ''} --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()


def pytest_collection_finish(session):
    """What all tests share is made: the collector of garbage need not look at it again."""
    import contexts  # imports JAX, which reads the environment that is set above

    contexts.reuse()
    gc.set_threshold(20_000, 20, 20)  # tracing makes many objects, and few of them in circles
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.freeze()  # pytest collects five times at its end, JAX once: seconds each, in what the process frees anyway


MODULES = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def garbage():
    """What JAX keeps of a module's programs is given up where it is too much; garbage is collected at every eighth.

    A loaded program holds several of the 65,530 mappings that Linux lets a process have, and the process dies at the
    next one. Far below that, workers would need 5 GB instead of 3.
    """
    yield
    mappings = Path("/proc/self/maps")
    full = mappings.exists() and mappings.read_bytes().count(b"\n") > 20_000
    if full:
        import jax  # reads the environment that is set above

        gc.unfreeze()
        jax.clear_caches()
    if full or next(MODULES) % 8 == 0:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """once(name, make): a folder that `make` has filled for all workers, and that no one may change: copy it first."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, whole = shared / name, shared / f"{name}.made"
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                whole.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def launch() -> Iterator[processes.Launcher]:
    """Starts the mains, all with one compile cache."""
    launcher = processes.Launcher(CACHE)
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def google():
    """An emulator of Google Cloud Storage with the bucket gs://bucket, and the proxy in front of it."""
    with buckets.google("bucket") as proxy:
        yield proxy


@pytest.fixture(scope="session")
def amazon():
    """An emulator of S3 with the bucket s3://bucket, and the proxy in front of it."""
    with buckets.amazon("bucket") as proxy:
        yield proxy


@pytest.fixture
def run_python(launch):
    """Runs a Python script, given as text, in a process with a number of virtual CPU devices; gives its stdout."""

    def run(script: str, *args: object, devices: int = 1, expect: int = 0) -> str:
        with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
            file.write(script)
            file.flush()
            done = launch.forked(file.name, *args, devices=devices)
        assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
        return done.stdout

    return run


@pytest.fixture
def optimised(monkeypatch):
    """What is lowered and compiled by hand is compiled as users do, for tests of what that costs or looks like."""
    import jax  # reads the environment that is set above

    compile = jax.stages.Lowered.compile
    options = {"xla_cpu_use_fusion_emitters": True} if _EMITTERS else {}
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: compile(lowered, options))
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
