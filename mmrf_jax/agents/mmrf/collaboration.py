"""Attention between agents: what each learns from the others (MMRF, section 4)."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn


class Collaboration(nn.Module):
    """Multi-head attention over the other agents, its query, key and value maps shared by all agents.

    alpha_ij is proportional to exp((W_k h_j) . (W_q h_i) / sqrt(d)) over j != i, and x_i = sum_j alpha_ij W_v h_j.
    """

    heads: int

    @nn.compact
    def __call__(self, h: chex.Array) -> tuple[chex.Array, chex.Array]:
        """Agent states h [..., N, d] -> what each gathers x [..., N, d], and the attention [..., heads, N, N].

        With a single agent there is nobody to attend to: x and the attention are 0.
        """
        num_agents, dim = h.shape[-2:]

        def split(y):
            return y.reshape(*y.shape[:-1], self.heads, dim // self.heads)

        query, key, value = (split(nn.Dense(dim, use_bias=False, name=n)(h)) for n in ("query", "key", "value"))
        logits = jnp.einsum("...ihd,...jhd->...hij", query, key) / jnp.sqrt(dim // self.heads)
        others = ~jnp.eye(num_agents, dtype=bool)
        attention = jax.nn.softmax(logits, axis=-1, where=others)
        x = jnp.einsum("...hij,...jhd->...ihd", attention, value)
        return x.reshape(h.shape), attention
