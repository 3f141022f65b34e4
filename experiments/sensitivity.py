"""Sensitivity of MMRF to single settings: the share and sampling of videos not shown, and the uncertainty bonus.

mmrf sweep --config=experiments/sensitivity.py --out=experiments/results/sensitivity
"""

from experiments import base


def get_config():
    # A dot in a variant's name would make it a nested field.
    def label(name, value):
        return f"{name}={value}".replace(".", "_")

    def agents(name, values):
        return {label(name, value): {"agents": {name: value}} for value in values}

    variants = agents("counterfactual_weight", (0.0, 0.1, 0.5, 1.0)) | agents("sampling", ("score", "uncertainty"))
    variants |= agents("uncertainty_bonus", (-1.0, -0.3, 0.3, 1.0))
    config = base.get_config(**variants)
    config.seeds = 2
    return config
