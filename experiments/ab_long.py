"""Persistence of gains: users return over two simulated weeks to production, MMRF, MMRF without the model, and LTR.

mmrf sweep --config=experiments/ab_long.py --out=experiments/results/ab_long
"""

from experiments import base, table_ab


def get_config():
    config = base.get_config(ltr=table_ab.tuned("ltr"), da={"agents": {"ablation": "no_augmentation"}})
    config.reference = "ltr"
    config.tables = ("by_day",)
    config.sessions = 5_000  # users per arm and seed
    return config
