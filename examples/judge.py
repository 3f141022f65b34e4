"""Evaluate rankers and experiments from arrays: GAUC, off-policy estimates, A/B effects. Needs no JAX.

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

# Off-policy: the value of a policy that shows the first of two videos with another probability than the logging policy.
first_logged, first_target = rng.uniform(0.1, 0.9, 5_000), rng.uniform(0.1, 0.9, 5_000)
first = rng.random(5_000) < first_logged
logged, target = (np.where(first, p, 1.0 - p) for p in (first_logged, first_target))
reward = rng.random(5_000) < np.where(first, 0.2 + 0.3 * first_target, 0.2)
names = ("ips", "snips", "ncis", "dr", "switch_dr", "dros")
for name, estimate in mmrf.ope.estimate(
    reward, pscore=logged, target_pscore=target, group=users, estimators=names
).items():
    print(f"{name}: {estimate}")

# Of slates of five, shown from the top down: the mean reward of a slate.
slates = {"slate_id": np.repeat(np.arange(1_000), 5), "position": np.tile(np.arange(5), 1_000)}
names = ("iips", "rips", "snrips", "cascade_dr")
for name, estimate in mmrf.ope.estimate(
    reward, pscore=logged, target_pscore=target, estimators=names, **slates
).items():
    print(f"{name}: {estimate}")

# Experiments: any metrics per user, ratios of sums, with a covariate from before the experiment.
before = {arm: rng.gamma(2.0, 300.0, 2_000) for arm in ("control", "treatment")}
arms = {
    arm: {
        "watch_time": x + rng.normal(20.0 * (arm == "treatment"), 100.0, 2_000),
        "videos": rng.poisson(x / 30.0) + 1,
        "likes": rng.poisson(0.3 + 0.02 * (arm == "treatment"), 2_000),
        "watch_time_last_week": x,
    }
    for arm, x in before.items()
}
metrics = {
    "watch_time": "watch_time",
    "likes_per_video": ("likes", "videos"),
    "active": lambda table: table["videos"] >= 20,
}
options = {"control": "control", "covariate": "watch_time_last_week", "metrics": metrics}
for metric, effect in mmrf.abtest.compare(arms, **options)["treatment"].items():
    print(f"{metric}: {effect}")
for metric, effect in mmrf.abtest.compare(arms, always_valid=True, **options)["treatment"].items():
    print(f"{metric}, at any number of interim analyses: {effect}")
print("sample ratio, p:", mmrf.abtest.sample_ratio_mismatch({"control": 5_012, "treatment": 4_988}))
