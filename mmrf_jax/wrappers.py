"""Wrappers of environments: Gymnasium's interfaces, and oracles, which see the hidden state.

Gymnasium is optional: `pip install mmrf_jax[gym]`. It is imported when its wrappers are first used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import chex

from mmrf_jax.envs import rankers

if TYPE_CHECKING:
    from mmrf_jax.envs.gymnasium_envs import GymnasiumEnv, GymnasiumVectorEnv

__all__ = ["GymnasiumEnv", "GymnasiumVectorEnv", "oracle"]


def oracle(score: Callable[[Any, Any], chex.Array], temperature: float = 0.0) -> rankers.PrivilegedPolicy:
    """Return a policy for `mmrf.rollout` that sees the hidden ground truth, which no other policy does.

    Args:
      score: (params, hidden state) -> scores [B, C]: the environment's parameters, and `state.hidden`.
      temperature: 0 shows the K highest scores; above 0 samples slates (Plackett–Luce on scores / temperature).

    Example:
      >>> import jax, mmrf_jax as mmrf
      >>> env = mmrf.make("short-video", num_videos=3_000, num_candidates=20, slate_size=3, max_requests=4)
      >>> quality = mmrf.wrappers.oracle(lambda params, state: params.hidden[state.candidates, 16])
      >>> mmrf.rollout(env, quality, num_users=20, key=jax.random.key(0))["watch_time"].shape
      (20,)
    """
    return rankers.PrivilegedPolicy(score, temperature)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mmrf_jax.wrappers' has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        wrappers = importlib.import_module("mmrf_jax.envs.gymnasium_envs")
    except ModuleNotFoundError as error:
        if error.name != "gymnasium":
            raise
        raise ModuleNotFoundError(
            f"mmrf_jax.wrappers.{name} needs gymnasium; pip install mmrf_jax[gym]", name="gymnasium"
        ) from None
    return getattr(wrappers, name)


def __dir__() -> list[str]:
    return sorted(__all__)
