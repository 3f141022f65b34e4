"""All methods in the world and in the two shifted worlds: A/B metrics per session, compared with MMRF.

mmrf sweep --config=experiments/table_ab.py --out=experiments/results/table_ab
"""

from experiments import base

#: Choices of experiments/tuning.py: factor on the learning rates of critic and actor, and the target networks' rate.
TUNED = {
    "wide_deep": (2.0, 0.05),
    "pareto": (2.0, 0.02),
    "tscac": (2.0, 0.05),
    "iql": (2.0, 0.05),
    "ltr": (2.0, 0.05),
}
BASELINES = ("bc", "wide_deep", "deepfm", "pareto", "tscac", "massa", "td3_bc", "iql", "ltr")


def fields(method: str, factor: float = 1.0, polyak: float = 0.05) -> dict:
    """Return the fields of a method's run with its rates."""
    config = base.get_config().run.agents
    rates = {name: factor * config[name] for name in ("learning_rate", "actor_learning_rate")}
    return {"method": method, "agents": {**rates, "polyak": polyak}}


def tuned(method: str) -> dict:
    """Return the fields of a method's run as tuned."""
    return fields(method, *TUNED.get(method, ()))


def get_config():
    config = base.get_config(**{name: tuned(name) for name in BASELINES})
    config.tables = ("ab_test", "ab_test_users", "ab_test_exit_hazard")
    config.sessions = 10_000
    config.arms = ("production", "random", "popularity", "oracle_myopic", "oracle_planning")
    return config
