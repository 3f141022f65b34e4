"""Products in a lower precision: operands rounded to bfloat16, sums and results in float32 (Micikevicius et al., 2018).

Parameters, losses, gradients and statistics stay float32; only what enters a product of an encoder or a head is
rounded, in the forward and in the backward pass.
"""

from __future__ import annotations

import functools
import string
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn


def einsum(subscripts: str, a: chex.Array, b: chex.Array, dtype: str) -> chex.Array:
    """Compute `jnp.einsum` of two float32 arrays, with operands of a lower precision if `dtype` says so.

    Args:
      subscripts: two operands, in which each index of one is in the other or in the output.
      dtype: "float32", or "bfloat16" for rounded operands.

    Returns:
      float32.
    """
    if dtype == "float32":
        return jnp.einsum(subscripts, a, b)
    return _rounded(_without_ellipsis(subscripts, a.ndim, b.ndim), a, b)


def dense(features: int, dtype: str, **fields: Any) -> nn.Dense:
    """Return `nn.Dense(features, **fields)` whose product has operands of a lower precision if `dtype` says so."""
    return nn.Dense(features, dot_general=None if dtype == "float32" else _dot_general, **fields)


def _dot_general(x: chex.Array, kernel: chex.Array, dimension_numbers: Any, precision: Any = None) -> chex.Array:
    """Compute the product of `nn.Dense`."""
    del precision
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())), dimension_numbers
    return _rounded(_without_ellipsis("...i,io->...o", x.ndim, kernel.ndim), x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(subscripts: str, a: chex.Array, b: chex.Array) -> chex.Array:
    return _product(subscripts, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))


def _forward(subscripts: str, a: chex.Array, b: chex.Array) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return _product(subscripts, a, b), (a, b)


def _backward(
    subscripts: str, operands: tuple[chex.Array, chex.Array], gradient: chex.Array
) -> tuple[chex.Array, chex.Array]:
    (a, b), gradient = operands, gradient.astype(jnp.bfloat16)
    left, right, out = subscripts.replace("->", ",").split(",")
    return _product(f"{out},{right}->{left}", gradient, b), _product(f"{out},{left}->{right}", gradient, a)


_rounded.defvjp(_forward, _backward)


def _product(subscripts: str, a: chex.Array, b: chex.Array) -> chex.Array:
    """Compute a product of bfloat16 arrays in float32; CPUs use float32 and get the same numbers."""

    def product(a, b):
        return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)

    def of_float32(a, b):
        return product(a.astype(jnp.float32), b.astype(jnp.float32))

    return jax.lax.platform_dependent(a, b, cpu=of_float32, default=product)


def _without_ellipsis(subscripts: str, *ranks: int) -> str:
    """Replace each `...` by as many letters as an operand has further axes, the same from the right in all."""
    operands, out = subscripts.split("->")
    extra = [rank - len(x.replace("...", "")) for x, rank in zip(operands.split(","), ranks, strict=True)]
    extra = [number if "..." in x else 0 for x, number in zip(operands.split(","), extra, strict=True)]
    letters = string.ascii_uppercase[: max(extra)]

    def written(x: str, number: int) -> str:
        return x.replace("...", letters[len(letters) - number :])

    left = ",".join(written(x, number) for x, number in zip(operands.split(","), extra, strict=True))
    return f"{left}->{written(out, len(letters))}"
