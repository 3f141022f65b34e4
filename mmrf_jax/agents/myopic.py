"""The supervised myopic ranker: predicts the watch time of a video and ranks by it; the same encoders, no future.

The comparison that shows what ranking for the session adds.
"""

from __future__ import annotations

import functools

from mmrf_jax.agents import supervised
from mmrf_jax.agents.mmrf import networks

update = functools.partial(supervised.update, critic=networks.Critic, signals=("watch_time",))
make = functools.partial(supervised.make, critic=networks.Critic, rank=supervised.by_watch_time)
