"""Contribution of the feedback model by its labels alone, by its part of the values alone, and by both.

mmrf sweep --config=experiments/model_parts.py --out=experiments/results/model_parts
"""

from experiments import base


def get_config():
    config = base.get_config(
        labels_only={"agents": {"model_weight": 0.0}},  # values come from the critics alone
        values_only={"agents": {"counterfactual_weight": 0.0}},  # nothing is labelled
        da={"agents": {"ablation": "no_augmentation"}},  # neither
    )
    config.tables = ("ab_test", "errors")
    return config
