"""User encoders on KuaiRand's test days: with frozen histories, and after each request.

  mmrf sweep --config=experiments/encoders_kuairand.py --config.run.data.dir=$KUAIRAND_DIR \\
      --out=experiments/results/encoders_kuairand
"""

from experiments import encoders, table_offline_kuairand


def get_config():
    config = table_offline_kuairand.get_config()
    config.tables = ("offline_frozen", "offline")
    config.variants = {"mmrf": {}, **encoders.OTHERS}
    return config
