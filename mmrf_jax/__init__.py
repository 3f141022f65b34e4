"""Session-level short-video ranking in JAX: `import mmrf_jax as mmrf`.

Names load when they are first used (PEP 562), so importing the package takes no time and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_MODULES = ("abtest", "metrics", "ope", "testing", "wrappers")
_FROM = {
    "Estimate": "mmrf_jax.estimate",
    "Schema": "mmrf_jax.schema",
    "SessionLog": "mmrf_jax.data.frame_log",
    "Signal": "mmrf_jax.signals",
    **dict.fromkeys(("Run", "load", "train"), "mmrf_jax.runs"),
    **dict.fromkeys(("make", "register_env"), "mmrf_jax.envs.registry"),
    **dict.fromkeys(("Method", "register_method"), "mmrf_jax.agents.registry"),
    "register_policy": "mmrf_jax.plugins",
    **dict.fromkeys(("Policy", "rollout"), "mmrf_jax.envs.policies"),
}

__all__ = [
    "Estimate",
    "Method",
    "Policy",
    "Run",
    "Schema",
    "SessionLog",
    "Signal",
    "__version__",
    "abtest",
    "load",
    "make",
    "metrics",
    "ope",
    "register_env",
    "register_method",
    "register_policy",
    "rollout",
    "testing",
    "train",
    "wrappers",
]

if TYPE_CHECKING:
    from mmrf_jax import abtest, metrics, ope, testing, wrappers
    from mmrf_jax.agents.registry import Method, register_method
    from mmrf_jax.data.frame_log import SessionLog
    from mmrf_jax.envs.policies import Policy, rollout
    from mmrf_jax.envs.registry import make, register_env
    from mmrf_jax.estimate import Estimate
    from mmrf_jax.plugins import register_policy
    from mmrf_jax.runs import Run, load, train
    from mmrf_jax.schema import Schema
    from mmrf_jax.signals import Signal


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"mmrf_jax.{name}")
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    raise AttributeError(f"module 'mmrf_jax' has no attribute {name!r}; its public names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
