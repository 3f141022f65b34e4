"""Gradient conflict: cosines of the agents' gradients with the main agent's, and its attention to them, over training.

  mmrf sweep --config=experiments/conflict.py --out=experiments/results/conflict

experiments/leave_one_out.py measures how each agent raises or lowers watch time.
"""

from experiments import base


def get_config():
    config = base.get_config()
    config.run.alternation.conflict_batches = 16
    config.tables = ("conflict",)
    return config
