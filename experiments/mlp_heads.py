"""Cost in watch time of scoring by dot products: MMRF, and MMRF whose agents also score by an MLP of width 64.

mmrf sweep --config=experiments/mlp_heads.py --out=experiments/results/mlp_heads
"""

from experiments import base


def get_config():
    config = base.get_config(mlp={"agents": {"score_hidden": 64}})
    config.seeds = 5
    return config
