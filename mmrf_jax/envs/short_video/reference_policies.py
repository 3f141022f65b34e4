"""Reference policies that know hidden ground truth: production (a noisy view), the oracles (all of it), and random.

They read the hidden state, which agents never see; `envs.rollout` passes it only to privileged policies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import chex
import jax.numpy as jnp

from mmrf_jax.envs.rankers import PrivilegedPolicy
from mmrf_jax.envs.short_video import parameters, response, users
from mmrf_jax.envs.short_video.truth import truth_of

if TYPE_CHECKING:
    from mmrf_jax.envs.short_video.env import WorldState

# Weights of production's score: noisy match, noisy quality, noisy clickbait, log duration. Its noise limits it to
# 0.65–0.8 of the myopic oracle.
_PRODUCTION = (2.5, 0.65, 1.5, 0.03)
#: Value of a unit of enjoyment to the planning oracle, in seconds of watch time, by line search: watch time per session
#: 1,364 s at 0, 2,411 at 8, 2,506 at 10, 2,543 at 12, 2,539 at 14, 2,516 at 16, 2,431 at 20 (paired errors 3 to 7 s).
PLANNING_WEIGHT = 12.0


def production(params: parameters.WorldParams, state: WorldState) -> chex.Array:
    """Compute the scores [B, C] of the production ranker, to be served as Plackett–Luce at temperature 1."""
    hidden = params.hidden[state.candidates]
    match = users.MATCH_SCALE * jnp.einsum("bcd,bd->bc", hidden[..., : parameters.LATENT], state.traits.retrieval)
    match_weight, quality_weight, bait_weight, duration_weight = _PRODUCTION
    quality, clickbait = hidden[..., parameters.LATENT + 4], hidden[..., parameters.LATENT + 5]
    return (
        match_weight * match
        + quality_weight * quality
        + bait_weight * clickbait
        + duration_weight * hidden[..., parameters.LATENT + 2]
    )


def random(params: parameters.WorldParams, state: WorldState) -> chex.Array:
    """Return equal scores [B, C]: uniform slates when served as Plackett–Luce."""
    return jnp.zeros(state.candidates.shape, jnp.float32)


def oracle_myopic(params: parameters.WorldParams, state: WorldState) -> chex.Array:
    """Compute the true expected seconds of each candidate [B, C]."""
    return response.expected_watch(params, truth_of(params, state, state.candidates))


def oracle_planning(params: parameters.WorldParams, state: WorldState, weight: float = PLANNING_WEIGHT) -> chex.Array:
    """Compute the true immediate value plus `weight` seconds per unit of enjoyment, which moves the odds of staying."""
    truth = truth_of(params, state, state.candidates)
    return response.expected_watch(params, truth) + weight * truth.enjoyment


def policies() -> dict[str, PrivilegedPolicy]:
    """Return the arms that need no training: production serves Plackett–Luce, the oracles their best slate."""
    return {
        "production": PrivilegedPolicy(production, 1.0),
        "random": PrivilegedPolicy(random, 1.0),
        "oracle_myopic": PrivilegedPolicy(oracle_myopic, 0.0),
        "oracle_planning": PrivilegedPolicy(oracle_planning, 0.0),
    }
