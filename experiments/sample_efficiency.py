"""Sample efficiency of the feedback model: MMRF with and without it, trained on 3,072 and 12,288 real sessions.

mmrf sweep --config=experiments/sample_efficiency.py --out=experiments/results/sample_efficiency
"""

from experiments import base


def get_config():
    config = base.get_config(
        **{
            f"{name}_{thousands}k": {
                "agents": {"ablation": ablation},
                "collect": {"sessions": 1_024 * thousands // 3},  # in each of three rounds
            }
            for thousands in (3, 12)
            for name, ablation in (("mmrf", "none"), ("da", "no_augmentation"))
        }
    )
    del config.variants["mmrf"]
    config.reference = "da_12k"
    config.seeds = 5
    return config
