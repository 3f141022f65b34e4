"""Files and folders that are whole or absent, whatever the moment at which the process is killed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes JSON atomically: keys sorted, NumPy and JAX numbers and arrays accepted, no NaN.

    Raises:
      ValueError: for a number that is not finite, naming its place such as `ab_test.mmrf.watch_time.mean`.
      TypeError: for a value that JSON has no form for, naming its place.
    """
    text = json.dumps(plain(obj), sort_keys=True, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replaces a file by a text, atomically and durably (written beside it, synchronised, renamed)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with tmp.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming itself
    finally:
        os.close(folder)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder beside `path` to fill, renamed to it at the end; nothing is left of it where that is not reached."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.incomplete-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def plain(obj: Any, place: str = "") -> Any:
    """The same value in Python's own types.

    Raises:
      ValueError, TypeError: as `write_json`.
    """
    if isinstance(obj, dict):
        return {str(key): plain(value, f"{place}.{key}" if place else str(key)) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [plain(value, f"{place}[{i}]") for i, value in enumerate(obj)]
    if obj is None or isinstance(obj, str | bool | int):
        return obj
    if not isinstance(obj, float):
        if not (hasattr(obj, "dtype") and hasattr(obj, "shape")):
            raise TypeError(
                f"{place or 'the value'} is a {type(obj).__name__}; JSON holds numbers, texts, lists and dicts"
            )
        return plain(np.asarray(obj).tolist(), place)
    if not math.isfinite(obj):
        raise ValueError(f"{place or 'the value'} is {obj}; a result must be finite, leave it out or find its cause")
    return obj
