"""Starts the mains in processes that share one compile cache, on a world small enough for two busy cores."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Seconds after which a wait is given up. It only ends a hang: no test may pass or fail by the speed of the machine.
HANG = 1_800.0

#: A world job of a few seconds once it is compiled; all tests use these shapes, so that it is compiled once.
TINY = (
    "--config=experiments/world.py",
    "--config.quick=True",
    "--config.world.num_videos=1000",
    "--config.world.candidates=20",
    "--config.collect.sessions=100",
    "--config.collect.test_sessions=100",
    "--config.ab_test.sessions=64",
    "--config.train.batch=16",
    "--config.feedback.batch=16",
    "--config.agents.counterfactual_weight=0.5",
    "--config.alternation.gap_sessions=64",
    "--config.log_every=2",
    "--config.checkpoint_every=5",
)

#: After those: a shorter one.
ONE_ROUND = ("--config.alternation.rounds=1", "--config.alternation.gap_sessions=0")


#: The name of a folder that holds what some library takes for something else.
ODD = """x[3] *?'"{0}%d$H$ #é✓"""

#: Imports what the mains import, and answers lines of [program and arguments, environment, output, errors] with an exit
#: code. A fork runs each, which has nothing of JAX but its imports: the process that a start would be a second later.
FORKS = """
import gc, importlib, json, os, runpy, sys
import jax
sys.path.append("tests/launch")
import contexts
sys.path.pop()
for name in ("mmrf_jax.cli.common", "mmrf_jax.data.readers.kuairand.builder"):
    importlib.import_module(name)
for name in ("mmrf_jax.sweeps.sweep", "mmrf_jax.serving.export"):
    importlib.import_module(name)
contexts.reuse()
gc.set_threshold(20_000, 20, 20)
gc.collect()
gc.freeze()
for line in sys.stdin:
    program, environment, *files = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for number, name in enumerate([os.devnull, *files]):
    opened = os.open(name, os.O_RDWR)
    os.dup2(opened, number)
    os.close(opened)
os.environ.clear()
os.environ.update(environment)
jax.config.update("jax_num_cpu_devices", int(environment["JAX_NUM_CPU_DEVICES"]))  # JAX reads it when it is imported
sys.argv = program
if program[0].endswith(".py"):
    runpy.run_path(program[0], run_name="__main__")
else:
    runpy.run_module(program[0], run_name="__main__", alter_sys=True)
"""


@dataclasses.dataclass
class Launcher:
    """Runs `python -m launch.NAME`, one process of it in a fork, which saves its imports."""

    cache: Path
    forks: subprocess.Popen | None = None

    def forked(self, program: str, *args: object, devices: int = 1) -> subprocess.CompletedProcess:
        """What a module or a file of Python did, said and ended with, as a process that is started with arguments."""
        if self.forks is None:
            self.forks = subprocess.Popen(
                [sys.executable, "-c", FORKS],
                env=self.environment(),
                cwd=ROOT,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,
            )
        assert self.forks.stdin is not None and self.forks.stdout is not None
        command = [program, *map(str, args)]
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as error:
            print(
                json.dumps([command, self.environment(devices), out.name, error.name]),
                file=self.forks.stdin,
                flush=True,
            )
            code = ""
            watch = threading.Timer(HANG, os.killpg, (self.forks.pid, signal.SIGKILL))
            watch.start()
            try:
                code = self.forks.stdout.readline()
            finally:
                watch.cancel()
                if not code:  # it hung, or somebody interrupts the tests
                    os.killpg(self.forks.pid, signal.SIGKILL)
                    self.close()
            assert code, f"{command} was killed\n{error.read()[-12000:]}"
            return subprocess.CompletedProcess(command, int(code), out.read(), error.read())

    def close(self) -> None:
        if self.forks is not None:
            self.forks.communicate()
            self.forks = None

    def command(self, name: str, *args: object, processes: int = 1, devices: int = 1) -> list[str]:
        main = ["-m", f"launch.{name}", *map(str, args)]
        if processes == 1:
            return [sys.executable, *main]
        # A process that ends by itself does so in time, however busy the machine is.
        shape = [f"--num_processes={processes}", f"--devices_per_process={devices}", f"--grace_seconds={HANG}"]
        return [sys.executable, "-m", "launch.multiprocess", *shape, "--", *main]

    def environment(self, devices: int = 1) -> dict[str, str]:
        fixed = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        if devices > 1:  # which deadlock on few cores without it; one device has idle threads then, which look for work
            fixed["NPROC"] = "16"
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        return os.environ | fixed | cache

    def __call__(self, name: str, *args: object, devices: int = 1, processes: int = 1) -> subprocess.CompletedProcess:
        if processes == 1:
            return self.forked(f"launch.{name}", *args, devices=devices)
        command = self.command(name, *args, processes=processes, devices=devices)
        return subprocess.run(
            command, env=self.environment(devices), cwd=ROOT, capture_output=True, text=True, timeout=HANG
        )

    def start(
        self,
        name: str,
        *args: object,
        log: Path,
        devices: int = 1,
        processes: int = 1,
        stop_at: tuple[str, int] | None = None,
        cwd: Path = ROOT,
    ):
        """The process without waiting for it; its output goes to the new file `log`.

        `processes`: above 1, that of launch.multiprocess, with so many children of `devices` devices each.
        `stop_at`: the process stops itself right before that function is called for that time.
        """
        command = self.command(name, *args, processes=processes, devices=devices)
        if stop_at is not None:
            script = ROOT / "tests" / "multiprocess" / "stop_at.py"
            command = [sys.executable, script, *map(str, stop_at), f"launch.{name}", *map(str, args)]
        with log.open("xb") as out:
            env = self.environment(devices) | {"PYTHONPATH": str(ROOT)}
            return subprocess.Popen(command, env=env, cwd=cwd, stdout=out, stderr=out)

    def ok(self, name: str, *args: object, **kwargs) -> subprocess.CompletedProcess:
        done = self(name, *args, **kwargs)
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-12000:]}"
        return done


def error_line(done: subprocess.CompletedProcess, *parts: str) -> str:
    """The one line that a refused start prints; it must hold all the parts."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, f"exit {done.returncode}\n{done.stderr[-12000:]}"
    assert "Traceback" not in done.stderr
    assert len(lines) == 1, done.stderr[-4000:]
    for part in parts:
        assert part in lines[0], f"{part!r} is not in: {lines[0]}"
    return lines[0]


def rows(workdir: Path) -> list[dict]:
    """The complete rows of metrics.jsonl without wall times, and without the row of them at the end."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found if row["phase"] != "time"]


def results(workdir: Path) -> dict:
    return json.loads((workdir / "results.json").read_text())


def steps(workdir: Path) -> list[int]:
    """The committed checkpoints."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def phases(log: Path) -> list[str]:
    """The phases that a start has begun, as it says itself."""
    lines = [line.removeprefix("[0] ") for line in log.read_text().splitlines()]
    return [line.removeprefix("phase: ") for line in lines if line.startswith("phase: ")]


def wait_until(process: subprocess.Popen, condition) -> bool:
    """Waits until the condition holds; False if the process ended before."""
    end = time.monotonic() + HANG
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < end, "the moment never came"
        time.sleep(0.005)
    return False
