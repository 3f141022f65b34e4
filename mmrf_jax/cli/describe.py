"""The fields of a config as text: default, type, range and meaning of each. It does not import JAX."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from mmrf_jax import fields
from mmrf_jax.io import files
from mmrf_jax.training import configs


def describe(config: ConfigDict) -> str:
    """Return two lines for each field of a config: the flag with the config's value, and what it accepts and means."""
    values = {name: value for name, value in config.to_dict().items() if name not in ("when_quick", "variants")}
    declared = configs.declared_fields(values)
    lines = []
    for name, value in files.flat(values).items():
        if (spec := declared.get(name)) is not None:
            value = spec.default if value is None else value
            lines += [f"--config.{name}={_text(value)}", f"    {accepts(spec)}: {spec.metadata['meaning']}"]
    if quick := files.flat(config.to_dict().get("when_quick") or {}):
        lines += [
            "with --config.quick=True:",
            *(f"    --config.{name}={_text(value)}" for name, value in quick.items()),
        ]
    return "\n".join(lines)


def accepts(spec: dataclasses.Field) -> str:
    """Return a field's type and range, such as `int in [1, 65536]`."""
    text = fields.kind(spec).__name__
    if (among := spec.metadata["among"]) is not None:
        text = f"one of {', '.join(among)}"
    elif (within := spec.metadata["within"]) is not None:
        text = f"{text} in {within}"
    if isinstance(spec.default, tuple):
        text = f"tuple, each {text}"
    return f"{text}, or None" if spec.default is None else text


def _text(value: Any) -> str:
    """Return a value as the command line takes it."""
    return repr(value) if isinstance(value, tuple) else str(value)
