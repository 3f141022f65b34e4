"""Print what reading a log would assume and leave out, with counts, before anything is trained.

python -m launch.check_data --config=experiments/logs.py --config.data.path='logs/*.parquet' --config.data.schema=my.py

A log that does not fit its schema is one line on stderr, naming the column, the value, its row and the fix, and exit
code 2.
"""

from launch import common

_CONFIG = common.define_config("experiments/logs.py")


def main() -> None:
    from mmrf_jax.training import own_logs

    config = common.resolve_run(_CONFIG)
    if config.source != "logs":
        raise ValueError(f"config.source is {config.source!r}; this checks logs: use --config=experiments/logs.py")
    print(own_logs.read(config.own_logs, quiet=True).describe())


if __name__ == "__main__":
    common.run(main, devices=False)
