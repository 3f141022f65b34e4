"""Selection bias of the feedback model in the world: inverse propensities, random exposures, and both.

Production's choice depends on more than a model sees, so that its log overestimates the videos that were not shown.
Remedies: weights by fitted propensities of exposure (`propensity`), a share of requests with a random slate that every
request is marked by (`random`), or both. The same share without a feedback model is `da_random`, no remedy and no model
`da`. The share is 5 % of requests; KuaiRand's, of .37 %, would be thirty requests of each log here.

mmrf sweep --config=experiments/selection_bias.py --out=experiments/results/selection_bias
"""

from experiments import base


def get_config():
    propensity, share = {"debias": "propensity"}, {"random_share": 0.05}
    without = {"ablation": "no_augmentation"}
    config = base.get_config(
        propensity={"feedback": propensity},
        random={"collect": share},
        both={"feedback": propensity, "collect": share},
        da={"agents": without},
        da_random={"agents": without, "collect": share},
    )
    config.run.collect.random_share = 0.0  # requests of all arms have the same context
    config.run.collect.sessions = 1_024
    config.seeds, config.sessions = 3, 8_192
    config.tables = ("ab_test", "unseen", "errors")
    return config
