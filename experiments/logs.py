"""Train on your own log: one row per shown item, and a file that says what the columns mean.

  mmrf train --config=logs --config.data.path='logs/*.parquet' --config.data.schema=my.py \
    --workdir=runs/mine

It is the packaged config `logs`, and --config=logs names it from any folder.
"""

from mmrf_jax.configs.logs import get_config

__all__ = ["get_config"]
