"""Judge rankers and experiments from arrays: GAUC, off-policy estimates, A/B effects. Needs no JAX.

python examples/judge.py
"""

import numpy as np

import mmrf_jax as mmrf

rng = np.random.default_rng(0)

# Ranking: does the score order the videos of each user as the user's clicks do?
users = rng.integers(0, 200, 5_000)
scores = rng.normal(size=5_000)
clicks = rng.random(5_000) < 1.0 / (1.0 + np.exp(-scores))
print("GAUC of clicks:", mmrf.metrics.gauc(clicks, scores, users))
seconds = rng.exponential(10.0, 5_000) * np.exp(0.5 * scores)
print("XAUC of watch time:", mmrf.metrics.xauc(seconds, scores, users))

# Off-policy: what would a policy earn that shows a video with another probability than the logging policy did?
logged, target = rng.uniform(0.1, 0.9, 5_000), rng.uniform(0.1, 0.9, 5_000)
reward = rng.random(5_000) < 0.2 + 0.3 * target
for name, estimate in mmrf.ope.estimate(reward, pscore=logged, target_pscore=target, group=users).items():
    print(f"{name}: {estimate}")

# Experiments: any metrics per user, with a covariate from before the experiment.
before = {arm: rng.gamma(2.0, 300.0, 2_000) for arm in ("control", "treatment")}
arms = {
    arm: {
        "watch_time": x + rng.normal(20.0 * (arm == "treatment"), 100.0, 2_000),
        "likes": rng.poisson(0.3 + 0.02 * (arm == "treatment"), 2_000),
        "watch_time_last_week": x,
    }
    for arm, x in before.items()
}
for metric, effect in mmrf.abtest.compare(arms, control="control", covariate="watch_time_last_week")[
    "treatment"
].items():
    print(f"{metric}: {effect}")
print("sample ratio, p:", mmrf.abtest.sample_ratio_mismatch({"control": 5_012, "treatment": 4_988}))
