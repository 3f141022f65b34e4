"""MMRF in the world beside itself without collaboration (co), without the feedback model, so without videos that were
not shown (da), with a constant reward for those (ns), with the model's labels but not its values, and the other way
round.

python -m launch.study --config=experiments/table_ablation.py --out=experiments/results/table_ablation
"""

from experiments import study_size


def get_config():
    config = study_size.get_config(
        co={"agents": {"ablation": "co"}},
        da={"agents": {"ablation": "da"}},
        ns={"agents": {"ablation": "ns"}},
        labels_only={"agents": {"model_weight": 0.0}},  # values are the critics' alone
        values_only={"agents": {"non_impressions": 0.0}},  # nothing is labelled
    )
    config.tables = ("ab_test", "errors")
    config.sessions = 100_000
    return config
