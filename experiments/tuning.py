"""The tuning log: the rates of every method, chosen in another, tiny world; five trials each, two seeds.

  python -m launch.study --config=experiments/tuning.py --out=experiments/results/tuning

A supervised ranker has no actor, so it has three trials. `experiments.chosen` holds what was chosen.
"""

from experiments import study_size, table_ab

SUPERVISED = ("wide_deep", "deepfm", "ltr")
TRIALS = {  # factors on the rates of critic and actor
    "default": (1.0, 1.0),
    "half": (0.5, 0.5),
    "double": (2.0, 2.0),
    "actor_half": (1.0, 0.5),
    "actor_double": (1.0, 2.0),
}


def get_config():
    config = study_size.get_config()
    run = config.run
    run.world.seed, run.world.num_videos, run.world.candidates = 1, 5_000, 40
    run.collect.sessions = run.collect.test_sessions = 1_024
    config.variants = {
        f"{method}_{trial}": {
            "method": method,
            "agents": {
                "learning_rate": critic * run.agents.learning_rate,
                "actor_learning_rate": actor * run.agents.actor_learning_rate,
            },
        }
        for method in ("mmrf", *table_ab.BASELINES)
        for trial, (critic, actor) in TRIALS.items()
        if method not in SUPERVISED or critic == actor
    }
    config.reference = "mmrf_default"
    config.seeds = 2
    return config
