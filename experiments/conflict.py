"""Do the agents agree? Cosines of their gradients and the main agent's, and its attention to them, over training.

  python -m launch.sweep --config=experiments/conflict.py --out=experiments/results/conflict

What each agent gives to watch time or takes from it is in experiments/leave_one_out.py.
"""

from experiments import base


def get_config():
    config = base.get_config()
    config.run.alternation.conflict_batches = 16
    config.tables = ("conflict",)
    return config
