"""The supervised myopic ranker: ranks by a video's predicted main signal, without long-term value.

Its encoders are those of MMRF. The comparison with it shows what ranking for the session adds.
"""

from __future__ import annotations

import functools

from mmrf_jax.agents import supervised
from mmrf_jax.agents.mmrf import networks

update = functools.partial(supervised.update, critic=networks.Critic, only_main=True)
make = functools.partial(supervised.make, critic=networks.Critic, rank=supervised.by_main_signal)
