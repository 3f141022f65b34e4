"""Optional dependencies: which extra of the package to install, said in one line where one is absent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

#: Packages of Debian and Ubuntu with libraries that wheels leave to the system.
_DEBIAN = {"libgomp.so.1": "libgomp1"}


class MissingExtra(ImportError):
    """A feature needs what is not installed, an extra of the package or a system library; the message says which."""


@contextlib.contextmanager
def needed(extra: str) -> Iterator[None]:
    """Name what is missing if an import in this block does not find a package of an extra, or its system library.

    Args:
      extra: the extra, as in `pip install 'mmrf_jax[EXTRA]'`.

    Raises:
      MissingExtra: naming the package and the extra, or the library.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "mmrf_jax").split(".")[0] == "mmrf_jax":
            raise
        message = f"{error.name} is not installed; pip install 'mmrf_jax[{extra}]'"
        raise MissingExtra(message, name=error.name) from error
    except (ImportError, OSError) as error:
        library, colon, _ = str(error).partition(": cannot open shared object file")
        if not colon:
            raise
        fix = f"; apt-get install {_DEBIAN[library]}" if library in _DEBIAN else ""
        message = f"this system has no {library}, which a package of mmrf_jax[{extra}] needs{fix or '; install it'}"
        raise MissingExtra(message) from error
