"""One setting of MMRF at a time: the share of videos that were not shown and how they are drawn, and optimism.

python -m launch.study --config=experiments/sensitivity.py --out=experiments/results/sensitivity
"""

from experiments import study_size


def get_config():
    agents = lambda name, values: {f"{name}={value}": {"agents": {name: value}} for value in values}
    variants = agents("non_impressions", (0.0, 0.1, 0.5, 1.0)) | agents("sampling", ("score", "uncertainty"))
    variants |= agents("optimism", (-1.0, -0.3, 0.3, 1.0))
    config = study_size.get_config()
    # Names of variants have dots, so not as keywords.
    config.variants.update({name.replace(".", "_"): fields for name, fields in variants.items()})
    config.seeds = 2
    return config
