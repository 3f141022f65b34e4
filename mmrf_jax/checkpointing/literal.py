"""What orbax and TFDS look for in a folder: the folder's name is no pattern.

`glob` of etils, below both, reads brackets and stars in the folder as a pattern too, unlike that of pathlib; a folder
`x[3]` is then not found, after all work is done.
"""

import glob
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

_Path: Any = type(epath.Path())
_taken_as_pattern = _Path.glob


def _literal(self: Any, pattern: str) -> Iterator[Any]:
    """As `pathlib.Path.glob`."""
    return _taken_as_pattern(type(self)(glob.escape(os.fspath(self))), pattern)


def make_globs_literal() -> None:
    """Lets etils take the folders of patterns literally, in this process."""
    _Path.glob = _literal
