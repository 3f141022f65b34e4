"""All methods in the world and in the two shifted ones: what a session brings, against MMRF.

python -m launch.study --config=experiments/table_ab.py --out=experiments/results/table_ab
"""

from experiments import study_size

#: Factors on the rates of critic and actor, by experiments/tuning.py.
RATES = {"wide_deep": 2.0, "tscac": 2.0, "iql": 2.0, "ltr": 2.0}
BASELINES = ("bc", "wide_deep", "deepfm", "pareto", "tscac", "massa", "td3_bc", "iql", "ltr")


def tuned(method: str) -> dict:
    """The fields of a method's run."""
    config, factor = study_size.get_config().run.agents, RATES.get(method, 1.0)
    rates = {name: factor * config[name] for name in ("learning_rate", "actor_learning_rate")}
    return {"method": method, "agents": rates}


def get_config():
    config = study_size.get_config(**{name: tuned(name) for name in BASELINES})
    config.tables = ("ab_test", "ab_test_users", "ab_test_leaving")
    config.sessions = 10_000
    config.arms = ("production", "random", "popularity", "oracle_myopic", "oracle_planning")
    return config
