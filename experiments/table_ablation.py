"""MMRF in the world beside itself without the feedback model, so without videos that were not shown (da), with a
constant reward for those (ns), with the model's labels but not its values, and the other way round.

python -m launch.study --config=experiments/table_ablation.py --out=experiments/results/table_ablation
"""

from ml_collections import ConfigDict

from experiments import world


def get_config() -> ConfigDict:
    run = world.get_config()
    run.ab_test.sessions = 2_000  # the study has an A/B test of its own
    run.ab_test.arms = ("production",)
    run.alternation.gap_sessions = 0
    return ConfigDict(
        {
            "quick": False,  # one seed, tiny runs
            "run": run,
            "reference": "mmrf",  # what the other variants are compared with
            "variants": {  # fields of `run` that differ
                "mmrf": {},
                "da": {"agents": {"ablation": "da"}},
                "ns": {"agents": {"ablation": "ns"}},
                "labels_only": {"agents": {"model_weight": 0.0}},  # values are the critics' alone
                "values_only": {"agents": {"non_impressions": 0.0}},  # nothing is labelled
            },
            "arms": ("production",),  # that need no training
            "seeds": 5,
            "sessions": 100_000,  # in each arm and seed
            "when_quick": {"run": {**run.when_quick.to_dict(), "quick": True}, "seeds": 1, "sessions": 512},
        }
    )
