"""One agent or several: MMRF against a single agent whose reward is the sum of all, or the watch time alone.

mmrf sweep --config=experiments/single_vs_multi.py --out=experiments/results/single_vs_multi
"""

from experiments import base


def get_config():
    config = base.get_config(
        sum={"agents": {"signals": ("watch_time",), "reward": "sum_of_signals"}},
        only_watch_time={"agents": {"signals": ("watch_time",)}},
    )
    config.seeds = 5
    return config
