"""How far errors of the feedback model spread into the policy: the model fitted on 10, 33 and 100 % of each log, in
the same number of updates; what the policy then earns in the model and in the world, by round.

  python -m launch.study --config=experiments/optimism.py --out=experiments/results/optimism
"""

from ml_collections import ConfigDict

from experiments import table_ablation


def get_config() -> ConfigDict:
    config = table_ablation.get_config()
    config.run.alternation.gap_sessions = 4_096
    config.reference = "share_100"
    config.variants = ConfigDict(
        {
            "share_100": {},
            "share_33": {"feedback": {"log_share": 1.0 / 3.0, "epochs": 3}},
            "share_10": {"feedback": {"log_share": 0.1, "epochs": 10}},
        }
    )
    config.when_quick.run.alternation.gap_sessions = 64
    config.seeds = 2
    config.sessions = 20_000
    return config
