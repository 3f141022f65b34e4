"""The environment of a start: users without a home, platforms that are not there, JAX's settings."""

import collections
import json
import logging
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from processes import HANG, ROOT, TINY, error_line, results

from experiments import world
from mmrf_jax.cli import common
from mmrf_jax.training import startup

#: A start as a user whom the system does not know, as in containers.
UNKNOWN = """
import pwd, runpy, sys
def unknown(uid): raise KeyError(uid)
pwd.getpwuid = unknown
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def start(name: str, *flags: object, **environment: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key not in ("HOME", "JAX_COMPILATION_CACHE_DIR")}
    command = [sys.executable, "-c", UNKNOWN, f"launch.{name}", *map(str, flags)]
    return subprocess.run(command, env=env | environment, cwd=ROOT, capture_output=True, text=True, timeout=HANG)


@pytest.fixture
def no_one(monkeypatch):
    """No home, and a user whom the system does not know."""

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_no_cache_folder_is_no_error(no_one, monkeypatch, tmp_path):
    assert startup.cache_folder() is None
    monkeypatch.setenv("HOME", "/proc/nothing")  # a place where no one can make a folder
    assert startup.cache_folder() is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert startup.cache_folder() == str(tmp_path / ".cache" / "mmrf_jax" / "xla")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert startup.cache_folder() == str(tmp_path / "x" / "mmrf_jax" / "xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/proc/nothing")
    assert startup.cache_folder() is None
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/xla")
    assert startup.cache_folder() == "gs://bucket/xla"


@pytest.mark.parametrize(
    ("asked", "error", "line"),
    [
        ("cuda", AssertionError(), "JAX_PLATFORMS=cuda cannot be used: this build of JAX does not know it; use"),
        (
            "tpu",
            RuntimeError("Unable to initialize backend 'tpu': INTERNAL: no libtpu.so (set JAX_PLATFORMS='' to choose)"),
            "JAX_PLATFORMS=tpu cannot be used: Unable to initialize backend 'tpu': INTERNAL: no libtpu.so; use",
        ),
        (None, RuntimeError("no devices"), "JAX has no device: no devices; use JAX_PLATFORMS=cpu"),
    ],
)
def test_a_platform_that_is_not_there_is_named(asked, error, line, monkeypatch):
    def fails():
        raise error

    monkeypatch.setattr(jax, "local_devices", fails)
    if asked is None:
        monkeypatch.delenv("JAX_PLATFORMS")
    else:
        monkeypatch.setenv("JAX_PLATFORMS", asked)
    with pytest.raises(ValueError) as refused:
        common.check_devices()
    assert str(refused.value).startswith(line)


@pytest.mark.parametrize(
    ("path", "level", "heard"),
    [
        ("site-packages/orbax/checkpoint/checkpoint_manager.py", "WARNING", False),
        ("site-packages/matplotlib/__init__.py", "WARNING", False),
        ("site-packages/orbax/checkpoint/checkpoint_manager.py", "ERROR", True),
        ("site-packages/jax/_src/compiler.py", "WARNING", True),
        ("mmrf_jax/checkpointing/manager.py", "WARNING", True),
    ],
)
def test_warnings_of_libraries_about_their_own_settings_do_not_reach_the_user(path, level, heard):
    record = logging.makeLogRecord({"pathname": f"/usr/lib/{path}", "levelname": level})
    assert common._is_ours(record) is heard


WORLD = "--config=experiments/world.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("ab_test", (WORLD, "--arms=production", "--out={tmp}/ab.json")),
        ("benchmark", ("--out={tmp}/speed.json",)),
        ("collect", (WORLD, "--sessions=8", "--out={tmp}/log")),
        ("evaluate", ("--workdir={tmp}/run",)),
        ("export", ("--workdir={tmp}/run", "--out={tmp}/artefact")),
        ("closed_loop", ("--workdir={tmp}/loop",)),
        ("report", ("--workdir={tmp}/run",)),
        ("serve", ("--artifact={tmp}/artefact",)),
        ("sweep", ("--config=experiments/table_ablation.py", "--out={tmp}/study")),
        ("train", (WORLD, "--workdir={tmp}/new")),
    ],
)
def test_every_main_for_a_user_without_a_home_on_a_platform_that_is_not_there(name, flags, tmp_path):
    """One line, nothing written; the cache folder that cannot be had is not it."""
    (tmp_path / "run").mkdir()
    run = {key: value for key, value in world.get_config().to_dict().items() if key != "when_quick"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(run))
    done = start(name, *(flag.replace("{tmp}", str(tmp_path)) for flag in flags), JAX_PLATFORMS="cuda")
    error_line(done, "JAX_PLATFORMS=cuda cannot be used", "use JAX_PLATFORMS=cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_mains_without_devices_need_no_platform_and_no_home(tmp_path):
    rows = ("--rows=200", "--users=10", "--videos=50", "--variant=pure")
    done = start("synthesize", *rows, f"--out={tmp_path / 'log'}", JAX_PLATFORMS="cuda")
    assert done.returncode == 0, done.stderr
    done = start("prepare", f"--source={tmp_path / 'none'}", f"--out={tmp_path / 'out'}", JAX_PLATFORMS="cuda")
    error_line(done, "none")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"JAX_ENABLE_X64": "maybe"}, ("JAX does not start with", "JAX_ENABLE_X64=maybe", "correct or unset it")),
        ({"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "abc"}, ("MIN_COMPILE_TIME_SECS=abc", "correct or unset it")),
        ({"JAX_DEFAULT_PRNG_IMPL": "nosuch"}, ("JAX_DEFAULT_PRNG_IMPL=nosuch", "correct or unset it")),
        ({"JAX_NUM_CPU_DEVICES": "many"}, ("JAX_NUM_CPU_DEVICES=many", "correct or unset it")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_setting_that_jax_cannot_read_is_named(environment, parts, tmp_path):
    done = start("collect", WORLD, "--sessions=8", f"--out={tmp_path / 'log'}", **environment)
    error_line(done, *parts)


#: Programs that take more than a second to compile, and how often they are: sessions are served in the world and in the
#: feedback model.
LARGE = {
    "_draw": 1,
    "unroll": 1,
    "init_train_state": 1,
    "fit_step": 1,
    "_measure": 1,
    "update_step": 1,
    "_serve": 2,
    "score_and_predict": 1,
}


def train_under(launch, workdir: Path, **settings: str) -> subprocess.CompletedProcess:
    command, environment = launch.command("train", *TINY, f"--workdir={workdir}"), launch.environment() | settings
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-12000:]
    return done


@pytest.mark.slow
def test_the_smallest_run_has_the_same_results_and_programs_under_all_settings_of_jax(finished: Path, launch, tmp_path):
    """x64, another generator, strict promotion of dtypes, and none of ranks: to the bit.

    From an empty folder to its page, over two rounds, it compiles at most 12 large programs and 40 in all.
    """
    run = tmp_path / "run"
    done = train_under(
        launch,
        run,
        JAX_ENABLE_X64="1",
        JAX_DEFAULT_PRNG_IMPL="rbg",
        JAX_NUMPY_DTYPE_PROMOTION="strict",
        JAX_NUMPY_RANK_PROMOTION="raise",
        JAX_LOG_COMPILES="1",
    )
    assert "JAX_ENABLE_X64 is True here; runs compute with False" in done.stderr
    assert results(run) == results(finished)
    compiled = collections.Counter(re.findall(r"Finished XLA compilation of jit\((.+?)\) in", done.stderr))
    assert (run / "report.html").exists() and "no report" not in done.stderr
    assert {name: compiled[name] for name in LARGE} == LARGE
    assert sum(compiled.values()) <= 40, compiled


@pytest.mark.slow
def test_the_smallest_run_has_no_nan_on_its_way(finished: Path, launch, tmp_path):
    """JAX compiles without donated arguments then, so numbers differ by rounding."""
    train_under(launch, tmp_path / "run", JAX_DEBUG_NANS="1")
    final = [results(folder)["train"]["final"] for folder in (tmp_path / "run", finished)]
    losses = [{name: x for name, x in row.items() if name.startswith("loss/")} for row in final]
    assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.05) and losses[0]
