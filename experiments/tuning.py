"""The tuning log: learning rates and target-network rates of every method, chosen in another, small world.

Runs have as many sessions as those of the studies.

  mmrf sweep --config=experiments/tuning.py --out=experiments/results/tuning

The criterion is watch time in the A/B test; `table_ab.TUNED` has the choices.
"""

from experiments import base, table_ab

#: Factor on the learning rates of critic and actor, and the update rate of the target networks.
TRIALS = {"default": (1.0, 0.05), "double": (2.0, 0.05), "slow": (1.0, 0.02), "double_slow": (2.0, 0.02)}


def get_config():
    config = base.get_config()
    run = config.run
    run.world.seed, run.world.num_videos, run.world.candidates = 1, 5_000, 40
    run.ab_test.sessions = 1_000
    run.collect.test_sessions = 1_024
    config.variants = {
        f"{method}_{trial}": table_ab.fields(method, *chosen)
        for method in ("mmrf", *table_ab.BASELINES)
        for trial, chosen in TRIALS.items()
    }
    config.reference = "mmrf_default"
    config.seeds, config.sessions = 1, 4_000
    return config
