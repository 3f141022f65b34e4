"""Methods and policies from outside the package: a module registers them by name, and is imported to find them again.

Commands import modules with --import=MODULE; a run's config lists those that it needs (`plugins`). An installed package
names its modules, or functions that register, as entry points of the group `mmrf_jax.plugins`, which are loaded when a
name is otherwise unknown:

    [project.entry-points."mmrf_jax.plugins"]
    my_package = "my_package.rankers"

This module does not import JAX.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

from mmrf_jax import fields

GROUP = "mmrf_jax.plugins"
_UNNAMED = "__main__"  # the module of an interactive session, which no other process can import

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name: those of the package, and those that modules register."""

    def __init__(self, kind: str, entries: dict[str, T]):
        """Start from the package's own `entries`; what is registered is added to them."""
        self.kind, self.entries = kind, entries
        self._modules: dict[str, str] = {}

    def register(self, name: str, value: T, module: str) -> None:
        """Add an object.

        Args:
          name: of the object, new.
          value: the object.
          module: `__name__` of the module that registers it.

        Raises:
          ValueError: if another object has the name, or the name cannot be one.
        """
        if not name or name != name.strip() or set(name) & set("/\\,:="):
            raise ValueError(f"{name!r} cannot name a {self.kind}; use letters, digits and underscores")
        if self.entries.get(name, value) is not value:
            article = "an" if self.kind[0] in "aeiou" else "a"
            raise ValueError(f"{article} {self.kind} named {name!r} is registered already; use another name")
        if name not in self.entries:
            self._modules[name] = importable(module)
        self.entries[name] = value

    def module_of(self, name: str) -> str | None:
        """Return the module that registered an object; None for one of the package, or of an interactive session."""
        module = self._modules.get(name)
        return None if module == _UNNAMED else module

    def find(self, name: str, modules: Iterable[str] = ()) -> bool:
        """Return whether there is an object of this name, after importing `modules` and entry points if there is none.

        A module that does not exist is skipped: `get` names it.
        """
        for module in modules:
            if name not in self.entries and _missing(module) is None:
                load([module])
        if name not in self.entries:
            load_entry_points()
        return name in self.entries

    def get(self, name: str, modules: Iterable[str] = ()) -> T:
        """Return an object.

        Args:
          name: of the object.
          modules: modules that may register it, imported if the name is unknown.

        Raises:
          ValueError: if the name is unknown, with the modules that are missing.
        """
        modules = tuple(modules)
        if self.find(name, modules):
            return self.entries[name]
        missing = [module for module in modules if _missing(module) is not None]
        if missing:
            raise ValueError(
                f"unknown {self.kind} {name!r}: it may be of module {missing[0]!r}, which is not found; run this where "
                f"`import {missing[0]}` works, or give --import=MODULE with the module that registers it now"
            )
        near = fields.nearest(name, self.entries)
        advice = f"{near} There are" if near.startswith("did you mean") else "there are"
        raise ValueError(
            f"unknown {self.kind} {name!r}; {advice} {', '.join(self.entries)}; one of a plug-in needs "
            "--import=MODULE, the module that registers it"
        )


#: Policies that can be arms of A/B tests: functions (key, obs) -> scores [B, C], or `mmrf.Policy`.
POLICIES: Registry[Any] = Registry("policy", {})


def register_policy(name: str, policy: Any) -> None:
    """Make a policy available as an arm of A/B tests: `--arms=production,NAME`, or `ab_test.arms` of a run.

    Args:
      name: of the arm.
      policy: a function (key, obs) -> scores [B, C] of the candidates of B requests (`envs.environment.Observation`),
        or an object with a carry (`envs.policies.Policy`). The K highest scores are shown, in order.

    Raises:
      ValueError: if another policy has the name.
      TypeError: if it is neither.

    Example:
      >>> def first_feature(key, obs):
      ...     return obs.features[..., 0]
      >>> register_policy("first_feature", first_feature)
    """
    if not callable(policy) and not (hasattr(policy, "init") and hasattr(policy, "apply")):
        raise TypeError(f"policy {name!r} is {policy!r}; give a function (key, obs) -> scores [B, C], or a Policy")
    POLICIES.register(name, policy, caller())


def caller() -> str:
    """Return `__name__` of the module that called the function which calls this one."""
    return sys._getframe(2).f_globals.get("__name__", _UNNAMED)


def importable(module: str) -> str:
    """Return the name under which another process imports a module; of a script, the name of its file."""
    if module != _UNNAMED:
        return module
    main = sys.modules[_UNNAMED]
    if (spec := getattr(main, "__spec__", None)) is not None:  # python -m
        return spec.name.removesuffix(".__main__")
    path = Path(getattr(main, "__file__", None) or "")
    return path.stem if path.suffix == ".py" else _UNNAMED


def load(modules: Iterable[str]) -> None:
    """Import modules that register methods, policies or environments.

    Raises:
      ValueError: if there is no such module.
    """
    for module in modules:
        if (absent := _missing(module)) is not None:
            raise ValueError(
                f"--import={module}: there is no module {absent!r} in the current folder, PYTHONPATH or the installed "
                "packages; check its name (a module's, such as my_package.rankers)"
            )
        importlib.import_module(module)


def _missing(module: str) -> str | None:
    """Return the part of a module's name that cannot be found; None if all of it can."""
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return module
    for i in range(len(parts)):
        name = ".".join(parts[: i + 1])
        if name in sys.modules:
            continue
        importlib.invalidate_caches()
        try:
            found = importlib.util.find_spec(name)
        except (ModuleNotFoundError, ValueError):  # the parent is no package
            found = None
        if found is None:
            return name
    return None


@functools.cache
def load_entry_points() -> None:
    """Load the modules of installed packages, once; one that cannot be imported is an error that names it.

    Raises:
      ValueError: if a plug-in cannot be imported.
    """
    for point in metadata.entry_points(group=GROUP):
        try:
            loaded = point.load()
            if point.attr:  # a function that registers
                loaded()
        except Exception as error:
            package = "" if point.dist is None else f" of {point.dist.name}"
            raise ValueError(
                f"plug-in {point.name} = {point.value!r}{package} cannot be loaded ({type(error).__name__}: {error}); "
                "repair or uninstall it"
            ) from error
