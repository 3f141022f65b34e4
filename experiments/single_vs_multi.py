"""One agent or several: MMRF against a single agent whose reward is the sum of all, and against each agent alone.

mmrf sweep --config=experiments/single_vs_multi.py --out=experiments/results/single_vs_multi
"""

from experiments import base
from mmrf_jax.signals import SHORT_VIDEO


def get_config():
    config = base.get_config(
        sum={"agents": {"signals": ("watch_time",), "reward": "sum_of_signals"}},
        **{f"only_{name}": {"agents": {"signals": (name,)}} for name in SHORT_VIDEO.agents},
    )
    config.seeds = 2
    return config
