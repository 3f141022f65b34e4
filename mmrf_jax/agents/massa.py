"""MASSA (He et al., 2020, arXiv 2008.09369): soft actors that share a latent signal and do not communicate.

MMRF except for communication: instead of attention and auxiliary scores, every agent receives the same vector, computed
from the shared state and learned through all their objectives (`AgentConfig.communication`). Agents are soft as in
MMRF, by the entropy of their exposures; the signal is deterministic, its mean.
"""

from mmrf_jax.agents.mmrf.training_step import update

__all__ = ["update"]
