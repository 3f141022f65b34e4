"""Ablations of MMRF in the world.

They are MMRF without collaboration (co), without the feedback model and thus without videos that were not shown (da),
and with a constant reward for those videos (ns).

mmrf sweep --config=experiments/table_ablation.py --out=experiments/results/table_ablation
"""

from experiments import base


def get_config():
    config = base.get_config(
        co={"agents": {"ablation": "no_collaboration"}},
        da={"agents": {"ablation": "no_augmentation"}},
        ns={"agents": {"ablation": "constant_negative"}},
    )
    config.tables = ("ab_test", "errors")
    return config
