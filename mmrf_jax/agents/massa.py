"""MASSA (He et al., 2020, arXiv 2008.09369): soft actors that share a signal and do not communicate.

MMRF but for what agents know of each other: in the place of attention and auxiliary scores every agent gets the same
vector, made of the shared state and learned through all their objectives (`AgentConfig.communication`). Agents are
soft as MMRF's are, by the entropy of their exposures; the signal is its mean.
"""

from mmrf_jax.agents.mmrf.training_step import update

__all__ = ["update"]
