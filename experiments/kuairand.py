"""MMRF's agents on real logs: KuaiRand, from the folder of its CSV files.

  mmrf train --config=kuairand --config.data.dir=$KUAIRAND_DIR --workdir=runs/kuairand

It is the packaged config `kuairand`, and --config=kuairand names it from any folder.
"""

from mmrf_jax.configs.kuairand import get_config

__all__ = ["get_config"]
