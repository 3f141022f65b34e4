"""The main job: rounds of logs, feedback model and agents in the embedded world, then an A/B test against production.

  mmrf train --config=world --workdir=runs/world

It is the packaged config `world`, and --config=world names it from any folder.
"""

from mmrf_jax.configs.world import get_config

__all__ = ["get_config"]
