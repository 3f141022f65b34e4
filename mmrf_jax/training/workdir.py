"""The run folder: which config it belongs to, and the state of a finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mmrf_jax.metrics import files

_FREE_PREFIXES = ("log_", "profile_", "checkpoint_")
#: What a run writes into its folder, beside config.json.
_FOLDERS = ("checkpoints", "tensorboard", "profile")
_FILES = ("metrics.jsonl", "learned.json", "results.json", "truth.json", "off_policy.json", "report.html")


def is_free(name: str) -> bool:
    """Whether a field may change between two starts of one run."""
    return name.startswith(_FREE_PREFIXES)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries with dotted names. A field that is None is left out: what older configs did not have yet."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            out[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return out


def claim(workdir: Path, config: dict[str, Any]) -> list[Path] | None:
    """Makes the folder that of this config, or checks that it is.

    Returns:
      The folders that had to be made for it, the outermost first; None where it was this config's already.

    Raises:
      ValueError: where it was made by another config, naming the first field that differs and both values.
      OSError: where the folder cannot be written.
    """
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file; name a folder")
    if not path.exists():
        if found := [name for name in (*_FOLDERS, *_FILES) if (workdir / name).exists()]:
            raise ValueError(f"--workdir={workdir} holds {found[0]} but no config.json; use another --workdir")
        made = [folder for folder in (*reversed(workdir.parents), workdir) if not folder.exists()]
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(path, config)
        return made
    before, now = flat(read_config(workdir)), flat(config)
    for name in sorted(before.keys() | now.keys()):
        if is_free(name):
            continue
        if before.get(name) != now.get(name):
            raise ValueError(
                f"--workdir={workdir} was made by another config: config.{name} was {before.get(name)!r}, "
                f"now {now.get(name)!r}; use another --workdir or the old value"
            )
    return None


def release(workdir: Path, made: list[Path]) -> None:
    """Gives up a folder whose run failed before its first checkpoint, so that the corrected command can have it.

    What the run wrote goes, and of the folders those in `made`, as `claim` returned them. A run with a checkpoint is
    left as it is.
    """
    checkpoints = workdir / "checkpoints"
    if checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir()):
        return
    for name in _FOLDERS:
        shutil.rmtree(workdir / name, ignore_errors=True)
    for name in (*_FILES, "config.json"):
        (workdir / name).unlink(missing_ok=True)
    for folder in reversed(made):
        if any(folder.iterdir()):
            return
        folder.rmdir()


def read_config(workdir: Path) -> dict[str, Any]:
    """The config of a run.

    Raises:
      ValueError: where there is none or it is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} is not a run folder: it has no config.json; name the --workdir of launch.train")
    return read_json(path, "restore it or use another --workdir")


def read_json(path: Path, fix: str = "remove it, and the same command writes it again") -> dict[str, Any]:
    """A JSON file of a run.

    Raises:
      ValueError: where it is damaged, saying what to do.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {fix}") from error
