"""Run the whole loop on this machine: a served ranker collects feedback, is trained on it, and is replaced live.

  mmrf closed-loop --config=world --rounds=3 --workdir=runs/loop

Users of the world are HTTP clients of a service (`mmrf serve`). The first ranker is trained on production's log. In
each round --sessions new users visit; then `mmrf train` trains on the feedback log, `mmrf export` writes an artefact,
and the service switches to it while other users keep visiting. Watch time per session is printed by round, with its
95 % interval. Re-running with the same --workdir resumes the loop.

WORKDIR has runs/, artifacts/, served/ (the feedback log), current (a link to the served artefact) and loop.json.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags

from mmrf_jax.cli import common, parsing, serving
from mmrf_jax.io import copies, extras, files, tables
from mmrf_jax.io.progress import counted, phase, say
from mmrf_jax.training import configs, run_folder

_CONFIG = common.define_config("world")
_WORKDIR = common.define_path("workdir", None, "Folder of the loop.", required=True)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds of serve, train, swap.", lower_bound=1)
_SESSIONS = flags.DEFINE_integer("sessions", 2048, "Sessions of a round, and of production's log.", lower_bound=8)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.25, "Of the served ranker, see `mmrf serve`.", lower_bound=0.0)

_FIRST_USER, _USERS_A_ROUND, _USERS_A_TRY = 300_000_000, 20_000_000, 1_000_000


def main() -> None:
    with extras.needed("serve"):
        from mmrf_jax.serving.demo import clients
    config, folder = common.resolve_run(_CONFIG), _WORKDIR.value
    common.check_world(config)
    if config.seeds > 1:
        raise ValueError(f"a loop serves one run, but config.seeds={config.seeds}; leave it out")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--workdir={folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with files.held(folder):
        _loop(config, folder, clients)


def _loop(config, folder: Path, clients) -> None:
    """Run the remaining rounds; `clients` is the module."""
    from mmrf_jax.parallel.partitioner import Partitioner
    from mmrf_jax.training import restore, simulator_source

    asked = {"config": configs.as_dict(config), "sessions": _SESSIONS.value, "temperature": _TEMPERATURE.value}
    done = _Done(folder / "loop.json", files.plain(asked))
    config = configs.override(config, collect={"sessions": _SESSIONS.value})
    source = restore.source_of(config, Partitioner())
    assert source.sim is not None
    if done.production is None:
        phase("production")
        _train(folder, 0)
        log = source.train()
        done.production = _mean(np.add.reduceat(_seconds(log), log.offsets[:-1]))
        done.write()
    _export(folder, 0)
    current = folder / "current"
    files.point(current, _artifact(folder, len(done.rounds)))
    temperature = f"--temperature={_TEMPERATURE.value}"
    output = copies.Mirror(folder)
    with (
        contextlib.closing(output),
        serving.service(current, folder / "served", output.folder / "serve.log", temperature) as server,
    ):
        users = clients.Clients(source.sim, simulator_source.log_key(config.seed), config.ab_test.day, server.url)
        for number in range(len(done.rounds) + 1, _ROUNDS.value + 1):
            row = done.served(number)
            first = _FIRST_USER + number * _USERS_A_ROUND
            if row is None:
                phase(f"round {number}: serve")
                row = _serve_round(
                    users, serving.health(server.url)["artifact"], first + done.tried(f"{number}") * _USERS_A_TRY
                )
                done.keep(number, row)
            phase(f"round {number}: train")
            _train(folder, number)
            phase(f"round {number}: swap")
            _export(folder, number)
            files.point(current, _artifact(folder, number))
            moved = _Moved(server.url, row["artifact"])
            others = first + _USERS_A_ROUND // 2 + done.tried(f"{number} swap") * _USERS_A_TRY
            meanwhile = users.visit(others, _USERS_A_TRY, 32, until=moved)
            row |= {"sessions_during_swap": len(meanwhile.main), "failed_during_swap": meanwhile.failed}
            done.add(row)
            say(_line(row))
    print("\n".join(table(done.production or {}, done.rounds)))


def _serve_round(users, artifact: str, first_user: int) -> dict[str, Any]:
    """Serve one session to each of a round's users with an artefact; return the metrics."""
    visits = users.visit(first_user, _SESSIONS.value, progress=counted("visits", _SESSIONS.value))
    return {
        "artifact": artifact,
        "sessions": len(visits.main),
        "watch_time": _mean(visits.main),
        "depth": _mean(visits.depth),
        "requests": int(visits.requests.sum()),
        "ranked_per_second": visits.requests.sum() / visits.seconds,
        "failed": visits.failed,
    }


class _Done:
    """Progress of the loop, stored in a file."""

    def __init__(self, path: Path, asked: dict[str, Any]):
        """Load the progress, if the file exists.

        Raises:
          ValueError: if the folder belongs to another loop.
        """
        self._path = path
        self._all: dict[str, Any] = {"asked": asked, "production": None, "rounds": [], "tries": {}, "served": {}}
        if path.exists():
            self._all = run_folder.read_json(path)
            if (found := run_folder.first_difference(self._all["asked"], asked, "config.")) is not None:
                name, before, now = found
                raise ValueError(
                    f"{path.parent} was made with {name}={before!r}, now it is {now!r}; use another --workdir"
                )

    @property
    def production(self) -> dict[str, float] | None:
        return self._all["production"]

    @production.setter
    def production(self, mean: dict[str, float]) -> None:
        self._all["production"] = mean

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return self._all["rounds"]

    def tried(self, what: str) -> int:
        """Count an attempt and return the number of earlier ones; each attempt uses different users."""
        before = self._all["tries"].get(what, 0)
        self._all["tries"][what] = before + 1
        self.write()
        return before

    def served(self, number: int) -> dict[str, Any] | None:
        """Return the metrics of a round that has been served but not yet fully trained on."""
        return self._all["served"].get(str(number))

    def keep(self, number: int, row: dict[str, Any]) -> None:
        self._all["served"][str(number)] = row
        self.write()

    def add(self, row: dict[str, Any]) -> None:
        self.rounds.append(row | {"round": len(self.rounds) + 1})
        self.write()

    def write(self) -> None:
        files.write_json(self._path, self._all)


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mmrf_jax.cli", *arguments]


def _train(folder: Path, number: int) -> None:
    """Train on the feedback log; number 0 trains on production's log, which it collects."""
    flag = flags.FLAGS["config"]
    given = [f"--config.{name}={value}" for name, value in config_flags.get_override_values(flag).items()]
    brief = ["--config.ab_test.sessions=2000", "--config.ab_test.arms=('production',)"]  # the rounds evaluate it
    settings = {
        "alternation.rounds": 1,
        "alternation.closed_loop": False,
        "collect.sessions": _SESSIONS.value,
        "data.dir": folder / "served" if number else "",
    }
    arguments = [*brief, *given, *(f"--config.{name}={value}" for name, value in settings.items())]
    workdir = folder / "runs" / str(number)
    if workdir.exists():
        with files.held(workdir, serving.PATIENCE):  # the process of a killed loop may still be saving
            pass
    _call("train", *common.imports(), f"--config={parsing.config_name()}", *arguments, f"--workdir={workdir}")


def _export(folder: Path, number: int) -> None:
    out = _artifact(folder, number)
    if not out.exists():
        _call("export", f"--workdir={folder / 'runs' / str(number)}", f"--out={out}")


def _call(main: str, *arguments: str) -> None:
    from mmrf_jax.parallel import preemption

    command = [*_python(main, *arguments), f"--parent={os.getpid()}"]
    # Separate process group: Ctrl-C is passed on, so that the process gets it once.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, process_group=0)
    try:
        code = process.wait()
    except preemption.Preempted as stopped:
        process.send_signal(stopped.number)
        process.wait()
        raise
    if code:
        raise ValueError(f"{main} ended with code {code}, see above; the same command resumes")


def _artifact(folder: Path, number: int) -> Path:
    return folder / "artifacts" / str(number)


class _Moved:
    """Callable that returns whether a service has switched from an artefact to the next.

    Raises:
      ValueError: if it cannot switch, or takes too long.
    """

    def __init__(self, url: str, before: str):
        self._url, self._before, self._end = url, before, time.monotonic() + serving.PATIENCE

    def __call__(self) -> bool:
        health = serving.health(self._url)
        if health["failed_swap"] or time.monotonic() > self._end:
            raise ValueError(f"the service still serves {self._before}: {health['failed_swap'] or 'it took too long'}")
        return health["artifact"] != self._before


def _seconds(log) -> np.ndarray:
    """Return the watch time [r] of each request of a log."""
    return np.where(log.slate >= 0, log.feedback[..., -1], 0.0).sum(axis=1, dtype=np.float64)


def _mean(values: np.ndarray) -> dict[str, float]:
    """Return the mean and the half-width of its 95 % interval (normal, independent users)."""
    return {"mean": float(values.mean()), "ci95": float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))}


def table(production: dict[str, float], rounds: list[dict[str, Any]]) -> list[str]:
    """Format the loop's rounds as Markdown, and say whether watch time has grown."""
    header = ("round", "ranker", "sessions", "watch time, s per session", "depth, videos", "failed requests")
    rows = [["–", "production", "–", f"{production['mean']:,.0f} ± {production['ci95']:,.0f}", "–", "–"]]
    for row in rounds:
        watched, depth, failed = row["watch_time"], row["depth"], row["failed"] + row["failed_during_swap"]
        cells = [f"{row['round']}", row["artifact"], f"{row['sessions']:,}"]
        cells.append(f"{watched['mean']:,.0f} ± {watched['ci95']:,.0f}")
        rows.append([*cells, f"{depth['mean']:.1f} ± {depth['ci95']:.1f}", f"{failed}"])
    lines = tables.markdown(header, rows).splitlines()
    for before, after in itertools.pairwise(rounds):
        a, b = before["watch_time"], after["watch_time"]
        gain, half = b["mean"] - a["mean"], float(np.hypot(a["ci95"], b["ci95"]))
        verdict = "grew" if gain > half else "fell" if gain < -half else "did not change beyond chance"
        lines.append(
            f"From round {before['round']} to {after['round']} watch time {verdict}: {gain:+,.0f} s "
            f"[{gain - half:+,.0f}, {gain + half:+,.0f}]."
        )
    return lines


def _line(row: dict[str, Any]) -> str:
    mean = row["watch_time"]
    return (
        f"{mean['mean']:,.0f} ± {mean['ci95']:,.0f} s per session, "
        f"{row['ranked_per_second']:,.0f} slates/s, {row['failed'] + row['failed_during_swap']} failed requests"
    )


def run() -> None:
    """Run this command."""
    common.run(main, resumes=True)
