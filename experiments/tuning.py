"""The tuning log: the rates of every method, chosen in another, small world with as many sessions as studies have.

  python -m launch.study --config=experiments/tuning.py --out=experiments/results/tuning

Chosen by watch time in the A/B test; `table_ab.RATES` holds the choices.
"""

from experiments import study_size, table_ab

TRIALS = {"default": 1.0, "double": 2.0}  # factors on the rates of critic and actor


def get_config():
    config = study_size.get_config()
    run = config.run
    run.world.seed, run.world.num_videos, run.world.candidates = 1, 5_000, 40
    run.ab_test.sessions = 1_000
    run.collect.test_sessions = 1_024
    config.variants = {
        f"{method}_{trial}": {
            "method": method,
            "agents": {
                "learning_rate": factor * run.agents.learning_rate,
                "actor_learning_rate": factor * run.agents.actor_learning_rate,
            },
        }
        for method in ("mmrf", *table_ab.BASELINES)
        for trial, factor in TRIALS.items()
    }
    config.reference = "mmrf_default"
    config.seeds, config.sessions = 1, 4_000
    return config
