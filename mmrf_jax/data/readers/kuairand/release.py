"""The official files of KuaiRand-Pure, -1K and -27K."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re

from mmrf_jax.io import copies, storage

_NAME = re.compile(
    r"(log_standard|log_random|user_features|video_features_basic)(?:_\d_\d\d_to_\d_\d\d)?_(pure|1k|27k)(_part\d+)?\.csv"
    r"(\.(?:gz|bz2|xz|zst|zip))?"
)


@dataclasses.dataclass(frozen=True)
class Release:
    """The files of one KuaiRand release; `logs` are standard and random (`is_rand` distinguishes rows)."""

    variant: str  # "pure", "1k" or "27k"
    logs: tuple[pathlib.Path, ...]
    users: tuple[pathlib.Path, ...]
    videos: tuple[pathlib.Path, ...]

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        return (*self.logs, *self.users, *self.videos)


def find_release(directory: str | os.PathLike) -> Release:
    """Find the official files in `directory` or `directory`/data.

    Raises:
      FileNotFoundError: for a missing directory, no log file at all, or no user or basic video features.
      ValueError: if files of two releases are in one folder, or one is compressed.
    """
    root = copies.local(storage.path(directory))
    if not root.is_dir():
        raise FileNotFoundError(f"KuaiRand directory {root} does not exist; name the folder of the unpacked download")
    folder = root / "data" if (root / "data").is_dir() else root
    found: dict[str, list[pathlib.Path]] = {}
    variants = set()
    for path in sorted(folder.iterdir()):
        if match := _NAME.fullmatch(path.name):
            if match[4] and not path.with_suffix("").exists():
                raise ValueError(f"{path} is compressed; unpack it")
            if match[4]:
                continue
            found.setdefault(match[1], []).append(path)
            variants.add(match[2])
    logs = (*found.get("log_standard", ()), *found.get("log_random", ()))
    if not logs:
        raise FileNotFoundError(
            f"{folder} holds no log_standard_*.csv or log_random_*.csv of KuaiRand; name the unpacked download"
        )
    if len(variants) > 1:
        raise ValueError(
            f"{folder} holds files of {' and '.join(sorted(variants))}; keep each release in its own folder"
        )
    variant = variants.pop()
    for kind in ("user_features", "video_features_basic"):
        if kind not in found:
            raise FileNotFoundError(
                f"{folder / f'{kind}_{variant}.csv'} is missing; copy it from the KuaiRand download"
            )
    return Release(variant, logs, tuple(found["user_features"]), tuple(found["video_features_basic"]))


def is_random(path: pathlib.Path) -> bool:
    """Return whether a file belongs to the random log, as its name says."""
    return path.name.startswith("log_random")
