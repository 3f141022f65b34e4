"""Selection bias in served slates: coverage and diversity with and without learning from videos that were not shown.

mmrf sweep --config=experiments/bias_coverage.py --out=experiments/results/bias_coverage
"""

from experiments import table_ablation


def get_config():
    config = table_ablation.get_config()
    config.variants = {name: config.variants[name] for name in ("mmrf", "da", "ns")}
    config.tables = ("ab_test", "ab_test_users", "ab_test_exit_hazard")
    config.arms = ("production", "random")
    return config
