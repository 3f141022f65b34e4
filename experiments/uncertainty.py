"""Whether the feedback model's uncertainty helps: as a bonus or a penalty of rewards, or to draw videos by.

mmrf sweep --config=experiments/uncertainty.py --out=experiments/results/uncertainty
"""

from experiments import base


def get_config():
    config = base.get_config(
        penalty={"agents": {"uncertainty_bonus": -0.3}},
        bonus={"agents": {"uncertainty_bonus": 0.3}},
        drawn={"agents": {"sampling": "uncertainty"}},
    )
    config.seeds = 5
    return config
