"""A patch of etils that makes `glob` treat the folder name literally, for orbax.

Unlike pathlib, etils' `glob` also reads brackets and stars in the folder name as a pattern. A folder `x[3]` would then
not be found, after all work is done.
"""

import glob
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

_Path: Any = type(epath.Path())
_taken_as_pattern = _Path.glob


def _literal(self: Any, pattern: str) -> Iterator[Any]:
    """Match as `pathlib.Path.glob` does."""
    return _taken_as_pattern(type(self)(glob.escape(os.fspath(self))), pattern)


def make_globs_literal() -> None:
    """Make etils treat folder names literally in `glob`, in this process."""
    _Path.glob = _literal
