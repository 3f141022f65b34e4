"""The run folder: claiming it for a config, and reading its JSON files."""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrf_jax.checkpointing import staging
from mmrf_jax.io import copies, files, storage

#: Per-user sums of the run's own arm in its A/B test.
USERS = "ab_test_users.npz"
_FREE_PREFIXES = ("seeds", "log_", "memory_", "profile_", "checkpoint_", "trackers", "plugins")
#: Files and folders that a run writes in addition to config.json.
LOG = "log"  # a run on an own log holds it
_FOLDERS = ("checkpoints", "tensorboard", "profile", "wandb", LOG)
_FILES = (
    *("metrics.jsonl", "metrics.csv", "trackers.json", "starts.json", USERS),
    *("learned.json", "results.json", "truth.json", "off_policy.json", "report.html"),
    *("inputs.json", "inputs.npz"),
)
#: Files that evaluate a finished run; more rounds make new ones.
_OF_RESULTS = ("results.json", USERS, "evaluation.json", "truth.json", "off_policy.json", "report.html")
_ROUNDS = ("alternation", "rounds")


def is_free(name: str) -> bool:
    """Return whether a field may change when a run is resumed."""
    return name.startswith(_FREE_PREFIXES)


def flat_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested dictionaries with dotted names, without fields that are None."""
    found = files.flat(tree)
    return {name: list(x) if isinstance(x, tuple) else x for name, x in found.items() if x is not None}


def first_difference(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> tuple[str, Any, Any] | None:
    """Return the first field in which two configs differ, with both values; fields that may change are left out.

    Args:
      before, now: nested dictionaries, in which fields that are None count as absent.
      prefix: of the names of a run's fields, such as "run.".
    """
    first, second = flat_config(before), flat_config(now)
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name) and not is_free(name.removeprefix(prefix)):
            return name, first.get(name), second.get(name)
    return None


@contextlib.contextmanager
def claimed_workdir(workdir: Path, config: dict[str, Any]) -> Iterator[None]:
    """Claim the folder for this config, and for this process alone, until the end of the block.

    If the block fails before the first checkpoint, the folder is released (`release_workdir`). If the process is killed
    before that, the next process takes the folder over, whatever its config.

    Raises:
      ValueError: if another process uses the folder, or as in `claim_workdir`.
      OSError: if the folder cannot be written.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file; name a folder")
    made = [folder for folder in (*reversed(workdir.parents), workdir) if not folder.exists()]
    workdir.mkdir(parents=True, exist_ok=True)
    with files.held(workdir):
        ours = False
        try:
            claim_workdir(workdir, config)
            ours = True
            yield
        except BaseException:
            if ours or made:
                release_workdir(workdir, made)
            raise


def claim_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Claim an existing folder for this config, or check that it already belongs to it.

    Raises:
      ValueError: if another config made the folder, naming the first field that differs and both values.
      OSError: if the folder cannot be written.
    """
    path = workdir / "config.json"
    if path.exists() and has_learned(workdir):
        check_same_config(workdir, config)
        if needs_more_rounds(workdir, config):
            files.write_json(path, config)
            for name in (*_OF_RESULTS, "learned.json"):  # last: it says that there is more to do
                (workdir / name).unlink(missing_ok=True)
        return
    if path.exists():
        release_workdir(workdir, [])  # left by a process that was killed before its first checkpoint
    if found := [name for name in (*_FOLDERS, *_FILES) if (workdir / name).exists()]:
        raise ValueError(f"--workdir={workdir} holds {found[0]} but no config.json; use another --workdir")
    files.write_json(path, config)


def needs_more_rounds(workdir: Path, config: dict[str, Any]) -> bool:
    """Return whether a run has finished training, with fewer rounds than the config has."""
    section, field = _ROUNDS
    done, wanted = workdir / "learned.json", config.get(section, {}).get(field)
    return wanted is not None and done.exists() and wanted > read_json(done).get("rounds", math.inf)


def check_same_config(workdir: Path, config: dict[str, Any]) -> None:
    """Refuse a config that differs from the run's; only a finished run may have more rounds than before.

    Raises:
      ValueError: naming the first field that differs and both values.
    """
    before = read_config(workdir)
    if needs_more_rounds(workdir, config):
        section, field = _ROUNDS
        before = before | {section: before[section] | {field: config[section][field]}}
    if (found := first_difference(before, config)) is not None:
        name, old, new = found
        raise ValueError(
            f"--workdir={workdir} was made by another config: config.{name} was {old!r}, now {new!r}; use another "
            "--workdir or the old value"
        )


def has_checkpoint(workdir: Path) -> bool:
    """Return whether a run has a committed checkpoint."""
    checkpoints = workdir / "checkpoints"
    if not checkpoints.is_dir():
        return False
    steps = [path for path in checkpoints.iterdir() if path.name.isdigit()]
    if storage.is_remote(checkpoints):  # where a step that is being written has its name already
        steps = [path for path in steps if (path / staging.COMMIT).exists()]
    return bool(steps)


def has_learned(workdir: Path) -> bool:
    """Return whether a run has results to lose: a committed checkpoint, learned.json or results.json."""
    return has_checkpoint(workdir) or any((workdir / name).exists() for name in ("learned.json", "results.json"))


def release_workdir(workdir: Path, made: list[Path]) -> None:
    """Release the folder of a run that failed before its first checkpoint, so that the corrected command can use it.

    Deletes the run's files, and the folders in `made` (outermost first) that are then empty. Does nothing if the run
    has a checkpoint or results.
    """
    if has_learned(workdir):
        return
    for name in _FOLDERS:
        files.remove(workdir / name)
    for name in (*_FILES, "config.json"):
        (workdir / name).unlink(missing_ok=True)
    for folder in reversed(made):
        if any(path.name != files.LOCK for path in folder.iterdir()):
            return
        (folder / files.LOCK).unlink(missing_ok=True)
        folder.rmdir()


def read_config(workdir: Path) -> dict[str, Any]:
    """Read the config of a run.

    Raises:
      ValueError: if it is missing or damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        seeds = sorted(found.parent.name for found in workdir.glob("seed*/config.json"))
        name = f"one of the seeds in it, such as {workdir / seeds[0]}" if seeds else "the workdir of a training run"
        raise ValueError(f"{workdir} is not a run folder: it has no config.json; name {name}")
    return read_json(path, "restore it or use another --workdir")


def arm_names(arms: Sequence[str]) -> list[str]:
    """Return the names of arms in tables and plots: of a run its method, with its folder where two arms share that.

    Args:
      arms: policies or run folders.

    Raises:
      ValueError: for two arms that would have the same name.
    """
    paths = [files.user_path(arm, "--arms") for arm in arms]
    runs = [(path / "config.json").exists() for path in paths]
    methods = [read_config(path)["method"] if run else arm for arm, path, run in zip(arms, paths, runs, strict=True)]
    names = [
        f"{method} ({path.resolve().name})" if run and methods.count(method) > 1 else method
        for method, path, run in zip(methods, paths, runs, strict=True)
    ]
    if len(set(names)) < len(names):
        raise ValueError(f"--arms={','.join(arms)} repeats a name; name each arm once, in folders of different names")
    return names


def write_user_sums(workdir: Path, blocks: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Write the per-user sums of the run's own arm, so that runs can be compared user by user.

    Args:
      workdir: the run folder.
      blocks: of users, as `statistics.ABTest.update` takes them.
    """
    names = [name for name in blocks[0] if name != "exposures"]
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in names}
    with files.new_file(workdir / USERS) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **columns)  # type: ignore[arg-type]


def read_user_sums(workdir: Path) -> dict[str, np.ndarray]:
    """Return the per-user sums of `write_user_sums`; {} if the run has none.

    Raises:
      ValueError: if the file is damaged.
    """
    path = workdir / USERS
    if not path.exists():
        return {}
    try:
        with np.load(copies.local(path)) as columns:
            return {name: columns[name] for name in columns.files}
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and runs are compared without it") from error


def read_json(path: Path, fix: str = "remove it, and the same command writes it again") -> dict[str, Any]:
    """Read a JSON file of a run.

    Raises:
      ValueError: if it is damaged, with a fix.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {fix}") from error
