"""What started a run: command, commit, host and time, kept in its folder for the page."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from mmrf_jax.io import files
from mmrf_jax.training import run_folder

#: The file in a run folder: the first start, and one entry per resumption.
STARTS = "starts.json"
_PROJECT = Path(__file__).resolve().parents[2]


def record_start(workdir: Path) -> None:
    """Add this start to the run folder."""
    files.write_json(workdir / STARTS, [*read_starts(workdir), describe_start()])


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """Return the starts of a run; [] before the first."""
    path = workdir / STARTS
    return run_folder.read_json(path) if path.exists() else []  # type: ignore[return-value]


def describe_start() -> dict[str, str]:
    """Describe this process: "start" in UTC, "host", "commit" and "command"."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"start": now, "host": platform.node(), "commit": commit(_PROJECT), "command": command()}


def command() -> str:
    """Return the command line of this process, in the form in which users type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = Path(sys.argv[0]).name
    if spec and not program.startswith("mmrf "):  # `mmrf_jax.cli.main` names its commands itself
        program = f"python -m {spec.name.removesuffix('.__main__')}"
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


def commit(project: Path) -> str:
    """Return the commit of a checkout, with "+ changes" if files differ from it; the installed version elsewhere."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(project), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        top, head = git("rev-parse", "--show-toplevel", "--short=12", "HEAD").splitlines()
        if Path(top).resolve() == project:
            return f"{head} + changes" if git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError, ValueError):
        pass  # no git here, or no checkout
    try:
        return f"version {importlib.metadata.version('mmrf-jax')}"
    except importlib.metadata.PackageNotFoundError:
        return ""
