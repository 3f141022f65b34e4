"""KuaiRand's official files as session logs of any size, and synthetic files like them: all that others use of it.

Names that need polars load when they are first used (PEP 562), since it takes a quarter of a second to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmrf_jax.data.readers.kuairand.config import KuaiRandConfig
from mmrf_jax.io import extras

if TYPE_CHECKING:
    from mmrf_jax.data.readers.kuairand.builder import KuaiRand, open_or_prepare, prepare_log, unchecked
    from mmrf_jax.data.readers.kuairand.synthetic import SyntheticLog

__all__ = [
    "KuaiRand",
    "KuaiRandConfig",
    "SyntheticLog",
    "open_or_prepare",
    "prepare_log",
    "unchecked",
]

_MODULES = {"SyntheticLog": "synthetic"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    with extras.needed("data"):
        return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'builder')}"), name)
