"""The commands as scripts. Python imports this package first for every `python -m launch.NAME`."""

import sys

from mmrf_jax import cli

if sys.argv[0] == "-m":  # the value of argv[0] while Python looks for the main module
    cli.begin()
