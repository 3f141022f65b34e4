"""Whether bfloat16 costs watch time: MMRF, and MMRF whose encoders and heads round the operands of products.

mmrf sweep --config=experiments/mixed_precision.py --out=experiments/results/mixed_precision
"""

from experiments import base

_LOW = {"compute_dtype": "bfloat16"}


def get_config():
    return base.get_config(bfloat16={"agents": _LOW, "feedback": _LOW})
