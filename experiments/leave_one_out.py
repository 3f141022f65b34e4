"""Contribution of each auxiliary agent to the others: MMRF without it.

mmrf sweep --config=experiments/leave_one_out.py --out=experiments/results/leave_one_out
"""

from experiments import base
from mmrf_jax.signals import SHORT_VIDEO


def get_config():
    def without(left_out):
        return tuple(name for name in SHORT_VIDEO.agents if name != left_out)

    config = base.get_config(
        **{f"without_{name}": {"agents": {"signals": without(name)}} for name in SHORT_VIDEO.agents[:-1]}
    )
    config.seeds = 5
    return config
