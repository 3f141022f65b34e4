"""Optional dependencies: which extra of the package to install, said in one line where one is absent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class MissingExtra(ImportError):
    """A feature needs an extra of the package that is not installed; the message says which."""


@contextlib.contextmanager
def needed(extra: str) -> Iterator[None]:
    """Name an extra if an import in this block does not find a package of it.

    Args:
      extra: the extra, as in `pip install 'mmrf_jax[EXTRA]'`.

    Raises:
      MissingExtra: naming the package and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "mmrf_jax").split(".")[0] == "mmrf_jax":
            raise
        message = f"{error.name} is not installed; pip install 'mmrf_jax[{extra}]'"
        raise MissingExtra(message, name=error.name) from error
