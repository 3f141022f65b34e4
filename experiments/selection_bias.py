"""Selection bias of the feedback model in the world: remedies with and without random exposures.

Production's choice depends on more than a model sees, so its log says too much good of the videos that it did not show.
Remedies: weights by fitted propensities of exposure (`propensity`), imputed feedback of videos that were not shown
(`imputed`), and a share of requests with a random slate, which every request says (`random`). `da` has no feedback
model. The share is 5 % of requests; KuaiRand's, of .37 %, would be a hundred requests of each log here.

  mmrf sweep --config=experiments/selection_bias.py --out=experiments/results/selection_bias
"""

from experiments import base


def get_config():
    config = base.get_config(
        propensity={"feedback": {"debias": "propensity"}},
        imputed={"feedback": {"imputed_weight": 0.5}},
        random={"collect": {"random_share": 0.05}},
        da={"agents": {"ablation": "no_augmentation"}},
    )
    config.run.collect.random_share = 0.0  # requests of all arms have the same context
    config.tables = ("ab_test", "unseen", "errors")
    return config
