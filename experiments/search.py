"""A search instead of a grid: rates and the weight of videos that were not shown, in the small world of `tuning`.

  mmrf sweep --config=experiments/search.py --out=runs/search

The criterion is watch time in the A/B test, in another world than that of the studies.
"""

from experiments import tuning
from mmrf_jax.training import config_sections, configs


def get_config():
    study = tuning.get_config()
    return configs.to_config_dict(
        config_sections.Search(trials=30, pruner="asha"),
        run=study.run,
        space={
            "agents": {
                "learning_rate": {"low": 5e-4, "high": 2e-2, "log": True},
                "actor_learning_rate": {"low": 5e-4, "high": 2e-2, "log": True},
                "polyak": {"low": 0.01, "high": 0.1, "log": True},
                "counterfactual_weight": [0.0, 0.1, 0.25, 0.5],
            }
        },
        when_quick={"run": study.when_quick.run, "trials": 3},
    )
