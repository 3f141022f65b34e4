"""How mains end: by signals, and where no one reads what they say; and that they start from any folder."""

import ast
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import processes
import pytest

from mmrf_jax.cli import closed_loop, endings
from mmrf_jax.parallel import preemption

ROOT = Path(__file__).resolve().parents[2]
MAINS = sorted(path.stem for path in (ROOT / "launch").glob("[a-z]*.py"))
#: Mains whose same command resumes where a signal has stopped them.
RESUME = {"train", "sweep", "closed_loop", "prepare"}
PATIENCE = 900  # seconds until a test that hangs ends


def unread(stream: str, *command: str, **kwargs) -> subprocess.CompletedProcess:
    """Runs a command of which no one reads stdout or stderr, as its reader has gone."""
    read, write = os.pipe()
    os.close(read)
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    try:
        return subprocess.run(
            [sys.executable, *command],
            **{stream: write, other: subprocess.PIPE},
            cwd=ROOT,
            text=True,
            timeout=PATIENCE,
            **kwargs,
        )
    finally:
        os.close(write)


def calls(path: Path, name: str) -> list[ast.Call]:
    """The calls of a function in a source."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [node for node in nodes if ast.unparse(node.func) == name]


@pytest.mark.parametrize("main", [main for main in MAINS if main not in ("multiprocess", "configs")])
def test_every_main_ends_as_all_do(main):
    """`common.run` hears signals and closed pipes; `multiprocess` passes signals on, and `configs` only prints."""
    (call,) = calls(ROOT / "mmrf_jax" / "cli" / f"{main}.py", "common.run")
    assert ("resumes" in {keyword.arg for keyword in call.keywords}) == (main in RESUME)


SAYS = """
import sys
from mmrf_jax.cli import endings
with endings.of_closed_pipes():
    {work}
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("work", ["print('a', file=sys.{stream})", "print('a', file=sys.{stream}); sys.exit(0)"])
def test_closed_pipes_end_a_process_as_shells_expect(stream, work):
    """Without a message, whether the line is written at once or as the process ends."""
    done = unread(stream, "-c", SAYS.format(work=work.format(stream=stream)))
    assert done.returncode == -signal.SIGPIPE and not done.stdout and not done.stderr


def test_other_broken_pipes_are_errors():
    with pytest.raises(BrokenPipeError), endings.of_closed_pipes():
        raise BrokenPipeError


def test_closed_pipes_of_several_processes():
    """They are asked to stop, and none is killed by what no one reads."""
    script = "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: exit(75))\nprint('a' * 9)\ntime.sleep(900)"
    done = unread("stdout", "-m", "launch.multiprocess", "--num_processes=2", "--grace_seconds=900", "--", "-c", script)
    assert done.returncode == -signal.SIGPIPE and not done.stderr


def test_a_second_signal_ends_several_processes_at_once():
    script = (
        "import signal, time\nsignal.signal(signal.SIGINT, lambda *_: print('reported'))\nprint('a')\ntime.sleep(900)"
    )
    script = script.replace("time.sleep(900)", "\nwhile True: time.sleep(0.01)")
    command = [sys.executable, "-m", "launch.multiprocess", "--num_processes=2", "--", "-c", script]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for said in ("a", "reported"):
        assert sorted(process.stdout.readline() for _ in range(2)) == [f"[0] {said}\n", f"[1] {said}\n"]
        process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 128 + signal.SIGKILL


def test_the_loop_waits_for_what_its_process_saves(tmp_path, monkeypatch):
    """It passes the signal on once, and stops when the process has ended by itself."""
    script = "import os, pathlib, signal, sys\nsignal.signal(signal.SIGINT, lambda *_: (there.unlink(), exit(75)))\n"
    script += "there = pathlib.Path(sys.argv[1])\nthere.touch()\nwhile True: signal.pause()"
    monkeypatch.setattr(closed_loop, "_python", lambda name, *args: [sys.executable, "-c", script, *args])
    there = tmp_path / "there"

    def stop() -> None:
        while not there.exists():
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop).start()
    with pytest.raises(preemption.Preempted), preemption.watching(at_once=True):
        closed_loop._call("train", str(there))
    assert not there.exists()


def test_no_text_names_a_file_of_the_checkout():
    """The wheel has no experiments, launch or requirements: messages name packaged configs, commands and extras."""
    paths = list((ROOT / "mmrf_jax").rglob("*.py"))
    texts = {
        f"{path.relative_to(ROOT)}: {node.value}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count("\n") < 2
    }
    naming = re.compile(r"experiments/\w+\.py|requirements-|-m launch|launch\.[a-z]")
    allowed = {"mmrf_jax/cli/parsing.py", "mmrf_jax/agents/mmrf/config.py"}  # scripts' help, and where a number is from
    found = [text for text in texts if naming.search(text) and text.split(":")[0] not in allowed]
    assert len(texts) > 1000 and not found


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_closed_pipes_of_every_main(stream, launch):
    """--help for stdout, an error for stderr: what each main says first."""
    flag = {"stdout": "--help", "stderr": "--no_such_flag"}[stream]
    for main in MAINS:
        if (main, stream) == ("multiprocess", "stderr"):
            continue  # absl tells it on stdout
        done = unread(stream, "-m", f"launch.{main}", flag, env=launch.environment())
        assert done.returncode == -signal.SIGPIPE, (main, done)
        assert not done.stdout and not done.stderr, (main, done)


@pytest.mark.slow
def test_a_closed_pipe_is_no_error_of_the_user_after_the_work(launch, tmp_path):
    out = tmp_path / "log"
    command = ("-m", "launch.synthesize", "--rows=200", "--users=10", "--videos=50", f"--out={out}")
    done = unread("stdout", *command, env=launch.environment())
    assert done.returncode == -signal.SIGPIPE and not done.stderr and list(out.iterdir())


def hears(process: subprocess.Popen) -> bool:
    """Whether a main handles SIGTERM by now."""
    handled = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return handled is not None and bool(int(handled[1], 16) >> signal.SIGTERM - 1 & 1)


@pytest.mark.slow
def test_signals_stop_every_main_without_a_traceback(launch, tmp_path):
    """What goes on by the same command exits with 75, anything else by the signal; nothing half-made stays."""
    source = tmp_path / "csv"
    launch.ok("synthesize", "--rows=20000", "--users=100", "--videos=5000", "--variant=pure", f"--out={source}")
    world = [x for x in processes.TINY if not x.startswith("--config.collect.sessions")]
    table = (f"--config={ROOT / 'experiments' / 'table_ablation.py'}", "--config.quick=True")
    starts = {
        "train": ([*world, "--config.collect.sessions=2000000", f"--workdir={tmp_path / 'train'}"], 75),
        "sweep": ([*table, f"--out={tmp_path / 'study'}", f"--runs={tmp_path / 'runs'}"], 75),
        "closed_loop": ([*world, f"--workdir={tmp_path / 'loop'}"], 75),
        "prepare": ([f"--source={source}", f"--out={tmp_path / 'records'}"], 75),
        "collect": ([*world, "--sessions=2000000", f"--out={tmp_path / 'collect'}"], None),
        "ab_test": ([*world, "--arms=production", "--sessions=2000000", f"--out={tmp_path / 'ab.json'}"], None),
        "synthesize": (["--rows=900000000", "--users=10000", "--videos=1000", f"--out={tmp_path / 'syn'}"], None),
        "benchmark": (["--suite=rollouts", f"--out={tmp_path / 'b.json'}"], None),
    }
    for number, (main, (args, code)) in zip(itertools.cycle((signal.SIGINT, signal.SIGTERM)), starts.items()):
        log = tmp_path / f"{main}.log"
        process = launch.start(main, *args, log=log)
        assert processes.wait_until(process, functools.partial(hears, process)), log.read_text()
        process.send_signal(number)
        said = (main, log.read_text()[-2000:])
        assert process.wait(PATIENCE) == (-number if code is None else code), said
        assert "Traceback" not in log.read_text() and f"asked to stop by {number.name}" in log.read_text(), said
    assert not [path for main in ("train", "collect", "ab.json", "b.json") if (path := tmp_path / main).exists()]


@pytest.mark.slow
def test_mains_work_from_any_folder_on_paths_of_any_name(launch, tmp_path):
    """The whole way of a run, but for the closed loop (test_closed_loop.py)."""
    folder = tmp_path / processes.ODD
    folder.mkdir()
    home = tmp_path / "home [me]"
    home.mkdir()
    env = launch.environment() | {"PYTHONPATH": str(ROOT), "HOME": str(home)}
    world = [x.replace("--config=", f"--config={ROOT}/") for x in processes.TINY if x.startswith("--config=")]
    world += [x for x in processes.TINY if not x.startswith("--config=")]

    def ok(main: str, *args: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", f"launch.{main}", *map(str, args)],
            env=env,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
        )
        assert done.returncode == 0, (main, done.stderr[-3000:])
        return done.stdout

    log, run = folder / "[log]", folder / "[run]"
    ok("collect", *world, "--sessions=100", f"--out={log}")
    ok("train", *world, *processes.ONE_ROUND, f"--config.data.dir={log}", "--workdir=[run]")
    assert (run / "report.html").exists()
    ok("evaluate", "--workdir=[run]")
    ok("report", "--workdir=[run]")
    ok("export", f"--workdir={run}", "--out=~/[artefact]")
    assert (home / "[artefact]").is_dir()
    arms = (f"--arms=production,{run}", "--sessions=64", "--out=[ab].json", "--plot=[ab].png")
    ok("ab_test", *world, *arms)
    assert (folder / "[ab].json").exists() and (folder / "[ab].png").exists()
    model = ("--config.simulator=feedback", f"--config.simulator_checkpoint={run}")
    ok("ab_test", *world, *model, "--arms=logged", "--sessions=64", "--out=[model].json")
    small = ("--rows=3000", "--users=60", "--videos=300", "--variant=pure")
    ok("synthesize", *small, "--out=[csv]")
    said = ok("prepare", "--source=[csv]", "--out=[records]")  # with its default config
    assert "rows -> " in said and (folder / "[records]").is_dir()
    assert {path.name for path in home.iterdir()} <= {"[artefact]", ".cache", ".config"}
