"""All methods in the world and in the two shifted ones: what a session brings, against MMRF.

python -m launch.study --config=experiments/table_ab.py --out=experiments/results/table_ab
"""

from experiments import study_size

BASELINES = ("bc", "wide_deep", "deepfm", "pareto", "tscac", "massa", "td3_bc", "iql", "ltr")


def get_config():
    config = study_size.get_config(**{name: {"method": name} for name in BASELINES})
    config.tables = ("ab_test", "ab_test_users", "ab_test_leaving")
    config.arms = ("production", "random", "popularity", "oracle_myopic", "oracle_planning")
    return config
