"""Print what reading a log would assume and leave out, with counts, before anything is trained.

  mmrf check-data --config=logs --config.data.path='logs/*.parquet' --config.data.schema=schema.py

A log that does not fit its schema is one line on stderr, naming the column, the value, its row and the fix, and exit
code 2.
"""

from mmrf_jax.cli import common

_CONFIG = common.define_config("logs")


def main() -> None:
    from mmrf_jax.training import own_logs

    config = common.resolve_run(_CONFIG)
    if config.source != "logs":
        raise ValueError(f"config.source is {config.source!r}; this checks logs: use --config=logs")
    print(own_logs.read_own_log(config.own_logs, quiet=True).describe())


def run() -> None:
    """Run this command."""
    common.run(main, devices=False)
