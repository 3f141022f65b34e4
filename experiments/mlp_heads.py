"""What scoring by products costs in watch time: MMRF, and MMRF whose agents score by an MLP of width 64 as well.

python -m launch.study --config=experiments/mlp_heads.py --out=experiments/results/mlp_heads
"""

from experiments import study_size


def get_config():
    config = study_size.get_config(mlp={"agents": {"score_hidden": 64}})
    config.seeds = 3
    return config
