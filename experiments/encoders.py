"""User encoders in the world: the user memory (decayed sums), the paper's GRU, or a causal transformer.

Agents and feedback model change together.

mmrf sweep --config=experiments/encoders.py --out=experiments/results/encoders
"""

from experiments import base

OTHERS = {name: {"agents": {"encoder": name}, "feedback": {"encoder": name}} for name in ("gru", "transformer")}


def get_config():
    config = base.get_config(**OTHERS)
    config.tables = ("ab_test", "errors")
    return config
