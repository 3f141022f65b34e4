"""Errors of the off-policy estimators, for rankers near production and far from it, against the world's true values.

mmrf sweep --config=experiments/table_estimators.py --out=experiments/results/table_estimators

Each policy mixes production's score with another ranker's, both standardised, and serves the result as Plackett–Luce.
"""

from ml_collections import ConfigDict

from experiments import world
from mmrf_jax.training import config_sections, configs


def get_config() -> ConfigDict:
    run = world.get_config()
    return configs.to_config_dict(
        config_sections.EstimatorStudy(),
        run=run,  # the study uses its world
        policies={  # ranker and its weight; the rest of the weight is production's
            "production": ("production", 1.0),
            "myopic_03": ("oracle_myopic", 0.03),
            "myopic_06": ("oracle_myopic", 0.06),
            "myopic_08": ("oracle_myopic", 0.08),
            "myopic_20": ("oracle_myopic", 0.2),
            "planning_10": ("oracle_planning", 0.1),
            "planning_20": ("oracle_planning", 0.2),
            "duration_05": ("duration", 0.05),
            "duration_10": ("duration", 0.1),
            "myopic_50": ("oracle_myopic", 0.5),
            "myopic": ("oracle_myopic", 1.0),
            "planning_50": ("oracle_planning", 0.5),
            "planning": ("oracle_planning", 1.0),
            "duration": ("duration", 1.0),
            "random": ("random", 1.0),
        },
        when_quick={
            "run": {**run.when_quick.to_dict(), "quick": True},
            "logs": 10,
            "log_users": 20,
            "log_requests": 2,
            "sessions": 256,
            "model_sessions": 64,
        },
    )
