"""The main job for one accelerator or several: large batches, logs that stay on the devices, many users in flight.

  mmrf train --config=experiments/world_accelerator.py --workdir=runs/accelerator
  mmrf train --config=experiments/world_accelerator.py --config.agents.compute_dtype=bfloat16 \\
      --config.feedback.compute_dtype=bfloat16 --workdir=runs/bfloat16

As many steps as experiments/world.py, each on sixteen times the sessions. docs/accelerators.md has its memory.
Its watch time has not been measured.
"""

import math

from ml_collections import ConfigDict

from experiments import world

BATCH, SESSIONS, SLOTS = 512, 131_072, 8_192


def get_config() -> ConfigDict:
    config = world.get_config()
    # Adam's steps shrink with the noise of the gradient, the square root of the batch (Malladi et al., 2022).
    scale = math.sqrt(BATCH / config.train.batch)
    config.feedback.learning_rate *= scale
    config.agents.learning_rate *= scale
    config.agents.actor_learning_rate *= scale
    config.feedback.batch = config.train.batch = BATCH
    config.train.log_on_device = True
    config.collect.update({"sessions": SESSIONS, "test_sessions": 8_192, "slots": SLOTS})
    config.ab_test.sessions = 100_000
    config.when_quick.update({"train": {"batch": 64}, "feedback": {"batch": 64}})
    return config
