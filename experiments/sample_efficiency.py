"""Sample efficiency of the feedback model: MMRF with and without it, trained on 4 k, 16 k and 64 k real sessions.

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
            for thousands in (4, 16, 64)
            for name, ablation in (("mmrf", "none"), ("da", "no_augmentation"))
        }
    )
    del config.variants["mmrf"]
    config.reference = "da_16k"
    config.seeds = 2
    return config
