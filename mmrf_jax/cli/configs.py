"""List the packaged configs, which --config names.

  mmrf configs
  mmrf train --config=world --describe

The second command lists the fields of one.
"""

from __future__ import annotations

import functools
import importlib

from absl import app

from mmrf_jax import configs
from mmrf_jax.cli import endings, parsing


def main(_: list[str]) -> None:
    width = max(map(len, configs.names()))
    for name in configs.names():
        text = importlib.import_module(f"{configs.__name__}.{name}").__doc__ or ""
        print(f"{name:<{width}}  {text.splitlines()[0]}")


def run() -> None:
    """Run this command."""
    parsing.explain(__name__)
    with endings.of_closed_pipes():
        app.run(main, flags_parser=functools.partial(parsing.parse, positional=False))
