"""Random numbers per user and step that do not depend on the batch, the slot or the number of devices.

On CPUs, JAX lowers its hash to a loop of small operations. This suits one large array, but at the 16 to 1,024 users of
a step it costs as much as the rest of the step.
"""

from __future__ import annotations

import functools
import math

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import types

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def to_normal(uniform: chex.Array) -> chex.Array:
    """Map uniforms in (0, 1) to standard normals, elementwise."""
    return jnp.sqrt(2.0).astype(uniform.dtype) * jax.lax.erf_inv(jnp.clip(2.0 * uniform - 1.0, -0.9999998, 0.9999998))


def to_gumbel(uniform: chex.Array) -> chex.Array:
    """Map uniforms in (0, 1) to standard Gumbel variates, elementwise."""
    return -jnp.log(-jnp.log(uniform))


def reference_per_user_uniform(key: types.Key, position: chex.Array, user_ids: chex.Array, num: int) -> chex.Array:
    """Draw all random numbers of one step: [B, num] uniforms in (0, 1), with one fold and one draw per user.

    Args:
      key: typed key of the whole rollout.
      position: [B] or scalar int32, step of each user, so that draws do not depend on when a slot was refilled.
      user_ids: [B] int32.
    """

    def one(position, user):
        folded = jax.random.fold_in(jax.random.fold_in(key, position), user)
        return jax.random.uniform(folded, (num,), jnp.float32, minval=1e-7, maxval=1.0)

    return jax.vmap(one)(jnp.broadcast_to(position, user_ids.shape), user_ids)


def per_user_uniform(key: types.Key, position: chex.Array, user_ids: chex.Array, num: int) -> chex.Array:
    """Compute `reference_per_user_uniform`, bit for bit, in one fused computation.

    Args:
      key: typed threefry key of the whole rollout.
      position: [B] or scalar int32.
      user_ids: [B] int32.
    """
    position = jnp.broadcast_to(position, user_ids.shape)
    other = functools.partial(reference_per_user_uniform, num=num)
    return jax.lax.platform_dependent(key, position, user_ids, cpu=functools.partial(_fused, num=num), default=other)


def uniforms(key: types.Key, shape: tuple[int, ...]) -> chex.Array:
    """Draw uniforms [*shape] in (0, 1) with `per_user_uniform`, instead of `jax.random.uniform`."""
    if 0 in shape:
        return jnp.zeros(shape)
    rows = jnp.arange(math.prod(shape[:-1]), dtype=jnp.int32)
    return per_user_uniform(key, 0, rows, shape[-1]).reshape(shape)


def _fused(key: types.Key, position: chex.Array, user_ids: chex.Array, num: int) -> chex.Array:
    k0, k1 = jax.random.key_data(key)
    folded = jax.ShapeDtypeStruct(user_ids.shape, jnp.uint32)
    k0, k1 = _apart(lambda: _fold(*_fold(k0, k1, position), user_ids), (folded, folded), user_ids)
    number = jnp.arange(num, dtype=jnp.uint32)[None, :]
    drawn = jax.ShapeDtypeStruct((*user_ids.shape, num), jnp.uint32)
    bits = _apart(lambda: jnp.bitwise_xor(*_fold(k0[:, None], k1[:, None], number)), drawn, user_ids)
    ones = jnp.uint32(0x3F800000)  # exponent bits of floats in [1, 2)
    unit = jax.lax.bitcast_convert_type(bits >> 9 | ones, jnp.float32) - 1.0
    low = jnp.float32(1e-7)
    return jnp.maximum(low, unit * (1.0 - low) + low)


def _apart(make, shapes, user_ids: chex.Array):
    """Return `make()`, of these shapes, outside the fusions of its consumers, which would each recompute it."""

    def nothing():
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return jax.lax.cond((user_ids[0] | 1) != 0, make, nothing)  # always true, but XLA does not analyse bits


@functools.partial(jax.jit, inline=True)  # the programs that draw for one number of users trace it once
def _fold(k0: chex.Array, k1: chex.Array, x: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Hash (0, x) by Threefry-2x32, 20 rounds; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011."""
    k0, k1, x = jnp.broadcast_arrays(k0, k1, x.astype(jnp.uint32))

    # Plain `lax`: so many operations of `jnp` would be most of what a rollout takes to trace.
    def constant(value: int) -> chex.Array:
        return jax.lax.full_like(x, value)

    turns = {r: (constant(r), constant(32 - r)) for rotations in _ROTATIONS for r in rotations}
    add, either, differ = jax.lax.add, jax.lax.bitwise_or, jax.lax.bitwise_xor
    k = (k0, k1, differ(differ(k0, k1), constant(0x1BD11BDA)))
    x0, x1 = k[0], add(x, k[1])
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            left, right = turns[r]
            x0 = add(x0, x1)
            x1 = differ(x0, either(jax.lax.shift_left(x1, left), jax.lax.shift_right_logical(x1, right)))
        x0, x1 = add(x0, k[(i + 1) % 3]), add(add(x1, k[(i + 2) % 3]), constant(i + 1))
    return x0, x1
