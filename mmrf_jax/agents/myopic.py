"""The supervised myopic ranker: ranks by a video's predicted watch time, with the same encoders and no long-term value.

The comparison with it shows what ranking for the session adds.
"""

from __future__ import annotations

import functools

from mmrf_jax.agents import supervised
from mmrf_jax.agents.mmrf import networks

update = functools.partial(supervised.update, critic=networks.Critic, signals=("watch_time",))
make = functools.partial(supervised.make, critic=networks.Critic, rank=supervised.by_watch_time)
