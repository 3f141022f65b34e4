"""Attention between agents: what each receives from the others (MMRF, section 4)."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from mmrf_jax.models import products


class Collaboration(nn.Module):
    """Multi-head attention over the other agents; all agents share its query, key and value maps.

    alpha_ij is proportional to exp((W_k h_j) . (W_q h_i) / sqrt(d)) over j != i, and x_i = sum_j alpha_ij W_v h_j.
    """

    heads: int
    dtype: str = "float32"  # of the operands of products

    @nn.compact
    def __call__(self, h: chex.Array) -> tuple[chex.Array, chex.Array]:
        """Map agent states h [..., N, d] to gathered states x [..., N, d] and the attention [..., heads, N, N].

        A single agent has no others to attend to: x and the attention are 0.
        """
        num_agents, dim = h.shape[-2:]

        def split(y):
            return y.reshape(*y.shape[:-1], self.heads, dim // self.heads)

        query, key, value = (
            split(products.dense(dim, self.dtype, use_bias=False, name=n)(h)) for n in ("query", "key", "value")
        )
        logits = products.einsum("...ihd,...jhd->...hij", query, key, self.dtype) / jnp.sqrt(dim // self.heads)
        others = ~jnp.eye(num_agents, dtype=bool)
        attention = jax.nn.softmax(logits, axis=-1, where=others)
        x = products.einsum("...hij,...jhd->...ihd", attention, value, self.dtype)
        return x.reshape(h.shape), attention
