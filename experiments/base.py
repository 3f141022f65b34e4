"""Base config of all studies in the world: an MMRF run that takes a minute on two cores, and its evaluation.

It has half the logs of experiments/world.py in as many rounds; studies share runs with equal configs.
"""

from ml_collections import ConfigDict

from experiments import world
from mmrf_jax.training import config_sections, configs


def get_config(**variants) -> ConfigDict:
    """Return a study of MMRF and `variants`, {name: fields of the run that differ}."""
    run = world.get_config()
    run.collect.sessions = 4_096
    run.collect.test_sessions = 2_048
    run.ab_test.sessions = 256  # studies run separate A/B tests
    run.ab_test.arms = ("production",)
    return configs.to_config_dict(
        config_sections.Study(),
        run=run,
        against={},  # variants with another reference: {variant: its reference}
        variants={"mmrf": {}, **variants},
        when_quick={"run": {**run.when_quick.to_dict(), "quick": True}, "seeds": 1, "sessions": 512, "days": 5},
    )
