"""The main job: rounds of logs, feedback model and agents in the embedded world, then an A/B test against production.

  python -m launch.train --config=experiments/world.py --workdir=runs/world
  python -m launch.train --config=experiments/world.py --config.agents.ablation=no_augmentation --workdir=runs/da
  python -m launch.train --config=experiments/world.py --config.method=myopic --workdir=runs/myopic
  python -m launch.train --config=experiments/world.py --config.quick=True --workdir=/tmp/look

It is the packaged config `world`, and --config=world names it from any folder.
"""

from mmrf_jax.configs.world import get_config

__all__ = ["get_config"]
