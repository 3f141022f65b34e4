"""All methods offline in the world: GAUC on production's held-out log, and NCIS of their stochastic rankers.

mmrf sweep --config=experiments/table_offline.py --out=experiments/results/table_offline
"""

from experiments import table_ab


def get_config():
    config = table_ab.get_config()
    config.tables = ("offline",)
    return config
