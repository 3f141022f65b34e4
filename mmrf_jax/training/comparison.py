"""Run folders, and the folders of sweeps, as the runs of a comparison."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmrf_jax.report import compare
from mmrf_jax.training import provenance, run_folder

MAX_RUNS = 20


def load_runs(folders: Sequence[Path], runs_dir: Path) -> tuple[list[compare.Run], list[str]]:
    """Read runs to compare.

    Args:
      folders: run folders, folders that hold run folders, or output folders of a sweep.
      runs_dir: folder of a sweep's runs.

    Returns:
      The runs, and a sentence for every sweep of which only the first seed is shown.

    Raises:
      ValueError: for a folder that is none of these, fewer than 2 runs or more than `MAX_RUNS`.
    """
    found: list[tuple[str, Path]] = []
    notes: list[str] = []
    for folder in folders:
        runs = list(_runs_of(folder, runs_dir))
        first = [(name, path) for name, path, seed in runs if seed == 0]
        if len(runs) > MAX_RUNS and len(first) < len(runs):
            notes.append(f"Of the {len(runs)} runs of {folder} those of the first seed are shown; its table has all.")
            found += first
        else:
            found += [(f"{name}, seed {seed}" if _is_sweep(folder) else name, path) for name, path, seed in runs]
    if not 2 <= len(found) <= MAX_RUNS:
        raise ValueError(f"{len(found)} runs to compare; name 2 to {MAX_RUNS}")
    paths = [path for _, path in found]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{next(path for path in paths if paths.count(path) > 1)} is named twice; name a run once")
    names = [name for name, _ in found]
    unique = [name if names.count(name) == 1 else str(path) for name, path in found]
    return [_read(name, path) for name, path in zip(unique, paths, strict=True)], notes


def _is_sweep(folder: Path) -> bool:
    return (folder / "table.json").exists()


def _runs_of(folder: Path, runs_dir: Path) -> Iterator[tuple[str, Path, int]]:
    """Yield the name, the folder and the seed of each run of a folder.

    Raises:
      ValueError: if it has none.
    """
    if (folder / "config.json").exists():
        yield folder.resolve().name, folder, 0
        return
    if _is_sweep(folder):
        for variant, places in run_folder.read_json(folder / "table.json").get("runs", {}).items():
            for seed, place in enumerate(places):
                if not (runs_dir / place / "config.json").exists():
                    raise ValueError(
                        f"run {place} of the sweep {folder} is not in {runs_dir}; name the folder of its runs as --runs"
                    )
                yield variant, runs_dir / place, seed
        return
    inside = sorted((path for path in folder.glob("*") if (path / "config.json").exists()), key=_natural)
    if not inside:
        run_folder.read_config(folder)  # which says that it is no run folder
    for path in inside:
        yield path.name, path, 0


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts run_2 before run_10."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _read(name: str, path: Path) -> compare.Run:
    results, metrics = path / "results.json", path / "metrics.jsonl"
    return compare.Run(
        name=name,
        config=run_folder.read_config(path),
        results=run_folder.read_json(results) if results.exists() else {},
        rows=_rows(metrics) if metrics.exists() else [],
        starts=provenance.read_starts(path),
        users=run_folder.read_user_sums(path),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a torn last line, of a run that is still learning or was killed, is left out."""
    lines = path.read_text().split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); resume the run, or name another") from error
