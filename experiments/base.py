"""What all studies of the world share: a run of MMRF that takes a minute on two cores, and how it is judged.

Half the logs of experiments/world.py, in as many rounds; studies share the runs whose configs are the same.
"""

from ml_collections import ConfigDict

from experiments import world
from mmrf_jax.training import configs


def get_config(**variants) -> ConfigDict:
    """A study of MMRF and `variants`, {name: fields of the run that differ}."""
    run = world.get_config()
    run.collect.sessions = 4_096
    run.collect.test_sessions = 2_048
    run.ab_test.sessions = 256  # studies have A/B tests of their own
    run.ab_test.arms = ("production",)
    return configs.to_config_dict(
        configs.Study(),
        run=run,
        against={},  # variants that are not compared with the reference: {variant: another one}
        variants={"mmrf": {}, **variants},
        when_quick={"run": {**run.when_quick.to_dict(), "quick": True}, "seeds": 1, "sessions": 512, "days": 5},
    )
