"""Effect of feedback-model errors on the policy: the model is fitted on 10, 33 and 100 % of each log.

The number of updates is the same. The study compares the policy's return in the model and in the world, by round.

  python -m launch.sweep --config=experiments/optimism.py --out=experiments/results/optimism
"""

from experiments import base


def get_config():
    config = base.get_config(
        share_33={"feedback": {"log_fraction": 1.0 / 3.0, "epochs": 3}},
        share_10={"feedback": {"log_fraction": 0.1, "epochs": 10}},
    )
    config.run.alternation.gap_sessions = 4_096
    config.when_quick.run.alternation.gap_sessions = 64
    config.tables = ("ab_test", "errors", "optimism")
    config.seeds = 2
    return config
