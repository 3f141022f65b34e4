"""Selection bias of the feedback model in the world: inverse propensities, random exposures, and both.

Production's choice depends on more than a model sees, so that its log overestimates the videos that were not shown.
Remedies: weights by fitted propensities of exposure (`propensity`), a share of requests with a random slate that every
request is marked by (`random`), or both. The same share without a feedback model is `da_random`, no remedy and no model
`da`. KuaiRand has a share of .37 %; one as small is `random_0037`.

mmrf sweep --config=experiments/selection_bias.py --out=experiments/results/selection_bias
"""

from experiments import base


def get_config():
    propensity, share = {"debias": "propensity"}, {"random_share": 0.05}
    without = {"ablation": "no_augmentation"}
    config = base.get_config(
        propensity={"feedback": propensity},
        random={"collect": share},
        random_0037={"collect": {"random_share": 0.0037}},
        both={"feedback": propensity, "collect": share},
        da={"agents": without},
        da_random={"agents": without, "collect": share},
    )
    config.run.collect.random_share = 0.0  # requests of all arms have the same context
    config.run.collect.sessions = 1_024
    config.seeds = 3
    config.tables = ("ab_test", "unseen", "errors")
    return config
