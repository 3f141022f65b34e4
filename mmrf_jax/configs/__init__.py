"""The packaged configs, and `load`, which finds a config by name, path or function. It does not import JAX."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.machinery
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from mmrf_jax import fields
from mmrf_jax.io import copies, files
from mmrf_jax.training import configs


def names() -> list[str]:
    """Return the names of the packaged configs."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(config: str) -> ConfigDict:
    """Return a config.

    Args:
      config: the name of a packaged config; the path of a Python file with `get_config()`, or FILE.py:ARGUMENT for
        `get_config(ARGUMENT)`; or MODULE:FUNCTION.

    Raises:
      ValueError: if there is no such config; the message starts with `config=`.
    """
    if config in names():
        return importlib.import_module(f"{__name__}.{config}").get_config()
    path = files.user_path(config, "config")
    if ":" in config and not path.exists():
        first, argument = config.split(":", 1)
        if not first.endswith(".py"):
            return _of_function(config, first, argument)
        return _get_config(files.user_path(first, "config"))(argument)
    if not (path.exists() or config.endswith(".py") or "/" in config):
        raise ValueError(
            f"config={config} is no packaged config; {fields.nearest(config, names())}; a file is named by its path, "
            "with .py, a function by MODULE:FUNCTION"
        )
    return _get_config(path)()


def _of_function(config: str, module: str, function: str) -> ConfigDict:
    try:
        make = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, but not what it imports
        raise ValueError(f"config={config}: no module {error.name!r}; check its name and the folder") from error
    except (AttributeError, ValueError) as error:
        raise ValueError(f"config={config}: {error}; name a function as MODULE:FUNCTION") from error
    found = make()
    return configs.to_config_dict(found) if dataclasses.is_dataclass(found) else found


def _get_config(path: Path) -> Callable[..., ConfigDict]:
    """Return the function `get_config` of a file."""
    try:
        file = copies.local(path)
        tree = ast.parse(file.read_text())
    except OSError as error:
        raise ValueError(
            f"config={path} cannot be read ({error.strerror}); use another file, or one of {', '.join(names())}"
        ) from error
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"config={path} is no Python file ({error}); correct it or use config=world") from error
    if not any("get_config" in _defined(node) for node in tree.body):
        raise ValueError(f"config={path} does not define get_config(); let it return a ConfigDict, or use config=world")
    name = f"_config_{path.stem}"
    spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, str(file)))
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


def _defined(node: ast.stmt) -> list[str]:
    """Return the names that a statement of a module defines: its functions, imports and assignments."""
    if isinstance(node, ast.ImportFrom | ast.Import):
        return [(alias.asname or alias.name) for alias in node.names]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [getattr(node, "name", "")]
