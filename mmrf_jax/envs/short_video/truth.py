"""The hidden ground truth of users in their current state: affinities and expected feedback."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import chex

from mmrf_jax.envs.short_video import parameters, response

if TYPE_CHECKING:
    from mmrf_jax.envs.short_video.env import WorldState


def truth_of(params: parameters.WorldParams, state: WorldState, videos: chex.Array) -> response.Affinity:
    """Compute the true affinities of videos [B, M] for the users in their current state."""
    return response.affinity(params, state.traits, state.interest, state.satiation, videos)


def expected_feedback(
    params: parameters.WorldParams, state: WorldState, slot: chex.Numeric = 0
) -> tuple[chex.Array, chex.Array]:
    """Compute true expected feedback [B, C, S] on candidates shown now in this slot, and log1p of seconds [B, C]."""
    truth = truth_of(params, state, state.candidates)
    truth = dataclasses.replace(truth, engagement=truth.engagement - params.behaviour.engagement_position * slot)
    return response.expected_feedback(params, state.traits, truth)
