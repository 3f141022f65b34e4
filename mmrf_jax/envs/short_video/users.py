"""Procedural users: all hidden traits of user u are derived from `fold_in(key, u)`, so 10^8 users use no memory."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import struct

from mmrf_jax import random
from mmrf_jax.envs.short_video import parameters

MATCH_SCALE = 4.0  # scales <interest, taste> of unit vectors in LATENT dimensions to unit spread for random pairs
TOPIC_WEIGHTS, TASTE_NOISE = (1.0, 0.8, 0.6), 0.12  # of an interest: a sum of topics, and noise


@struct.dataclass
class Traits:
    """Traits that are constant within a session; hidden except for the profile."""

    activity: chex.Array  # [B] general tendency to watch
    patience: chex.Array  # [B] tendency to stay
    susceptibility: chex.Array  # [B] strength of the clickbait effect, >= 0
    sociability: chex.Array  # [B] tendency to give explicit feedback
    retrieval: chex.Array  # [B, LATENT] the platform's noisy estimate of the user's interests at arrival
    profile: chex.Array  # [B, Du] visible to the agents


_HABITS = 4
NUM_UNIFORMS = parameters.TOPICS + 2 * parameters.LATENT + 2 * _HABITS


def draw(user_ids: chex.Array, params: parameters.WorldParams) -> tuple[Traits, chex.Array]:
    """Draw the traits and the initial interests [B, LATENT] (unit vectors) of users [B]."""
    u = random.per_user_uniform(params.user_key, 0, user_ids, NUM_UNIFORMS)
    cuts = [
        parameters.TOPICS,
        parameters.TOPICS + parameters.LATENT,
        parameters.TOPICS + 2 * parameters.LATENT,
        parameters.TOPICS + 2 * parameters.LATENT + _HABITS,
    ]
    gumbel = random.to_gumbel(u[:, : cuts[0]])
    taste, view, habits, noise = (
        random.to_normal(x) for x in jnp.split(u[:, cuts[0] :], [c - cuts[0] for c in cuts[1:]], -1)
    )
    b = params.behaviour
    chosen = jax.lax.top_k(params.topic_weight[None, :] + gumbel, len(TOPIC_WEIGHTS))[1]  # [B, 3]
    interest = unit(
        jnp.einsum("n,bnd->bd", jnp.array(TOPIC_WEIGHTS, jnp.float32), params.centroids[chosen]) + TASTE_NOISE * taste
    )
    retrieval = unit(interest + b.retrieval_noise * 0.25 * view)
    activity, patience, bait, social = habits.T
    habits_seen = habits + b.profile_noise * noise
    traits = Traits(
        activity=activity,
        patience=patience,
        susceptibility=jnp.exp(b.susceptibility * bait),
        sociability=social,
        retrieval=retrieval,
        profile=jnp.concatenate([MATCH_SCALE * retrieval, habits_seen], axis=-1),
    )
    return traits, interest


def unit(x: chex.Array) -> chex.Array:
    """Scale vectors to unit length."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-9)
