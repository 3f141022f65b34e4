"""Environments by name: `mmrf.make` and `mmrf.register_env`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from mmrf_jax import plugins
from mmrf_jax.envs import environment

Factory = Callable[..., environment.Environment]

#: Factories by name; `module:function` is imported when it is first used.
ENVIRONMENTS: plugins.Registry[Factory | str] = plugins.Registry(
    "environment",
    {
        "short-video": "mmrf_jax.envs.short_video.environment:make_short_video",
        "learned": "mmrf_jax.runs:learned_environment",
    },
)


def register_env(name: str, factory: Factory) -> None:
    """Make a factory available to `make`.

    Args:
      name: of the environment.
      factory: returns an `Environment`; its keyword arguments are those of `make`.

    Raises:
      ValueError: if another factory has the name.
      TypeError: if it cannot be called.

    Example:
      >>> from mmrf_jax.envs.short_video import environment
      >>> def tiny(seed: int = 0):
      ...     return environment.make_short_video(num_videos=40, num_candidates=40, slate_size=2, seed=seed)
      >>> register_env("tiny", tiny)
      >>> make("tiny").num_candidates
      40
    """
    if not callable(factory):
        raise TypeError(f"environment {name!r} is {factory!r}; give a function that returns an Environment")
    ENVIRONMENTS.register(name, factory, plugins.caller())


def make(name: str, **arguments: Any) -> environment.Environment:
    """Return the environment of a name.

    Args:
      name: `short-video`, `learned`, or a name given to `register_env`, by an installed plug-in too.
      arguments: of the environment. `short-video`: see `envs.short_video.environment.make_short_video`. `learned`: see
        `runs.learned_environment`.

    Raises:
      ValueError: for an unknown name, or sizes that cannot be.
      TypeError: for an unknown or missing argument.

    Example:
      >>> import jax, jax.numpy as jnp, mmrf_jax as mmrf
      >>> env = mmrf.make("short-video", num_videos=5_000, num_candidates=40, slate_size=6)
      >>> obs, state = env.reset(jax.random.key(0), env.default_params, user_ids=jnp.arange(64))
      >>> obs.candidates.shape
      (64, 40)
    """
    factory = ENVIRONMENTS.get(name)
    if isinstance(factory, str):
        module, function = factory.split(":")
        factory = getattr(importlib.import_module(module), function)
    known = inspect.signature(factory)
    try:
        known.bind(**arguments)
    except TypeError as error:
        raise TypeError(f"environment {name!r}: {error}; its arguments are {', '.join(known.parameters)}") from None
    return factory(**arguments)
