"""All methods in the world: watch time of a session and everything else of an A/B test against MMRF.

python -m launch.study --config=experiments/table_ab.py --out=experiments/results/table_ab
"""

from experiments import table_ablation

METHODS = ("mmrf", "bc", "wide_deep", "deepfm", "pareto", "tscac", "massa", "td3_bc", "iql", "ltr")


def get_config():
    config = table_ablation.get_config()
    config.variants = {name: {"method": name} for name in METHODS}
    return config
