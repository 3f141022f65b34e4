"""The run folder: which config it belongs to, and the state of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmrf_jax.metrics import files

#: Fields that may change between two starts of one run (contract.md, "Commands and files").
FREE_PREFIXES = ("log_", "profile_", "checkpoint_")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries with dotted names."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return out


def claim(workdir: Path, config: dict[str, Any]) -> bool:
    """Makes the folder that of this config, or checks that it is.

    Returns:
      Whether it was made now.

    Raises:
      ValueError: where it was made by another config, naming the first field that differs and both values.
      OSError: where the folder cannot be written.
    """
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file; name a folder")
    if not path.exists():
        if workdir.exists() and any((workdir / x).exists() for x in ("checkpoints", "metrics.jsonl", "results.json")):
            raise ValueError(f"--workdir={workdir} holds a run but no config.json; use another --workdir")
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(path, config)
        return True
    before, now = flat(read_config(workdir)), flat(config)
    for name in sorted(before.keys() | now.keys()):
        if name.split(".")[-1].startswith(FREE_PREFIXES):
            continue
        if before.get(name) != now.get(name):
            raise ValueError(
                f"--workdir={workdir} was made by another config: config.{name} was {before.get(name)!r}, "
                f"now {now.get(name)!r}; use another --workdir or the old value"
            )
    return False


def release(workdir: Path) -> None:
    """Gives up a folder that was claimed for nothing, so that the corrected command can have it.

    A folder that holds anything beside its config and an empty `checkpoints` is left as it is.
    """
    rest = {path.name for path in workdir.iterdir()} - {"config.json", "checkpoints"}
    checkpoints = workdir / "checkpoints"
    if rest or (checkpoints.is_dir() and any(checkpoints.iterdir())):
        return
    if checkpoints.is_dir():
        checkpoints.rmdir()
    (workdir / "config.json").unlink(missing_ok=True)
    workdir.rmdir()


def read_config(workdir: Path) -> dict[str, Any]:
    """The config of a run.

    Raises:
      ValueError: where there is none or it is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} is not a run folder: it has no config.json; name the --workdir of launch.train")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it or use another --workdir") from error
