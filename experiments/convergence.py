"""Convergence of the methods: each with twice the updates on the same logs.

mmrf sweep --config=experiments/convergence.py --out=experiments/results/convergence
"""

from experiments import base, table_ab


def get_config():
    methods = ("mmrf", *table_ab.BASELINES)
    config = base.get_config(
        **{f"{name}_twice": table_ab.tuned(name) | {"train": {"epochs": 2}} for name in methods},
        **{name: table_ab.tuned(name) for name in table_ab.BASELINES},
    )
    config.against = {f"{name}_twice": name for name in methods}
    config.tables = ("ab_test", "offline")
    return config
