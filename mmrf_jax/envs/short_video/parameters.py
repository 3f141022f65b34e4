"""Constants of the world: sizes that shape the computation, and the parameters of user behaviour.

The behaviour was calibrated once to the marginals of KuaiRand (standard log under the production ranker, random log
under uniform exposure); `tests/envs/short_video/test_calibration.py` checks the calibration.
"""

from __future__ import annotations

import dataclasses

import chex
import jax.numpy as jnp
from flax import struct

from mmrf_jax import types
from mmrf_jax.envs.short_video.config import WorldConfig

LATENT = 16  # dimensions of hidden taste
TOPICS = 32
PROFILE = LATENT + 4  # Du: noisy observations of taste, activity, patience, susceptibility to clickbait and sociability
CONTEXT = 3  # Dx: sine and cosine of the hour, log of the position in the session
FIRST_DAY, LAST_DAY = -90, 60  # uploads are spread over these days; users may visit on days 0 to LAST_DAY


@struct.dataclass
class Behaviour:
    """Parameters of user responses. Log-odds use the natural logarithm; units are seconds where stated."""

    # engagement: what makes a user watch; `play_curve` maps it to the log of the play time
    engagement_match: float = 0.714
    engagement_quality: float = 0.196
    engagement_clickbait: float = 0.449
    engagement_duration: float = 0.0
    engagement_activity: float = 0.23
    engagement_satiation: float = 0.3
    engagement_position: float = 0.03
    engagement_noise: float = 1.258
    # enjoyment: what makes a user like, follow and stay
    enjoyment_match: float = 0.8
    enjoyment_quality: float = 0.7
    enjoyment_clickbait: float = -0.9
    enjoyment_satiation: float = -0.4
    # log seconds = curve_start + sum of the slopes * relu(engagement - knots)
    curve_start: float = 0.0
    curve_knots: tuple = (-1.5, 0.0, 1.0, 2.0, 4.0)
    curve_slopes: tuple = (0.57, 0.302, 0.209, 0.137, -0.197)
    skip_prob: float = 0.34  # probability of swiping a video away unseen, after about `exp(skip_start)` seconds
    skip_start: float = 0.366
    replay_prob: float = 0.08  # probability that a finished video plays on
    # explicit feedback: intercept, and weights of enjoyment, match, log1p seconds watched, clickbait, no click
    like: tuple = (-4.77, 0.8, 0.0, 0.0, 0.0, -2.2)
    follow: tuple = (-8.1, 0.8, 0.1, 0.1, 0.0, -2.5)
    comment: tuple = (-10.45, 0.2, 1.0, 0.6, 0.0, -3.5)
    forward: tuple = (-7.79, 0.6, 0.0, 0.0, 0.0, -0.8)
    hate: tuple = (-8.58, -0.7, 0.0, 0.5, 0.3, 0.0)
    profile_enter: tuple = (-5.36, 0.5, 0.2, 0.2, 0.0, -2.0)
    # another request, interest drift and satiation
    continue_logit: float = 2.0
    continue_enjoyment: float = 0.8
    enjoyment_centre: float = 1.0
    continue_patience: float = 0.4
    continue_fatigue: float = 0.02
    drift: float = 0.03
    satiation_gain: float = 0.12
    satiation_decay: float = 0.8
    # returning within a day
    return_logit: float = 0.3
    return_enjoyment: float = 0.8
    # users
    retrieval_noise: float = 0.5
    profile_noise: float = 0.6
    susceptibility: float = 0.3


def behaviour(variant: str) -> Behaviour:
    """Return the parameters of a variant.

    `exit_hazard` has another hazard, `users` other habits (its mix: items.py). In `sparse` a play says little about
    what the user enjoys (more noise, more swipes, a weaker match), while enjoyment moves explicit signals and staying
    more than in the base world. Explicit signals are also more frequent.
    """
    base = Behaviour()
    if variant == "exit_hazard":
        return dataclasses.replace(
            base,
            continue_logit=base.continue_logit - 0.4,
            continue_enjoyment=1.6 * base.continue_enjoyment,
            continue_fatigue=0.05,
        )
    if variant == "users":
        return dataclasses.replace(base, susceptibility=0.6, engagement_activity=0.6, profile_noise=0.8)
    if variant == "sparse":
        return dataclasses.replace(
            base,
            engagement_match=0.3,
            engagement_noise=2.2,
            skip_prob=0.5,
            like=(-3.0, 1.4, 0.0, 0.0, 0.0, -0.8),
            follow=(-5.5, 1.4, 0.1, 0.1, 0.0, -0.8),
            comment=(-6.0, 1.4, 0.2, 0.2, 0.0, -0.8),
            forward=(-5.5, 1.4, 0.0, 0.0, 0.0, -0.4),
            hate=(-5.5, -1.4, 0.0, 0.0, 0.0, 0.0),
            continue_logit=1.4,
            continue_enjoyment=1.2,
        )
    return base


@struct.dataclass
class WorldParams:
    """The world as a pytree: hidden and visible attributes of the items, and the behaviour.

    Columns of `hidden` [V, LATENT + 6]: taste vector (unit), quality, clickbait, log duration, author's appeal, and the
    platform's estimates of quality and clickbait from the features it sees.
    Video ids are sorted: first the `num_popular` popular ones, most popular first, then topic by topic in order of
    upload, so that a retrieval cluster is a contiguous range of ids.
    """

    hidden: chex.Array  # [V, LATENT + 6] float32
    topic: chex.Array  # [V] int32
    centroids: chex.Array  # [TOPICS, LATENT] float32, unit vectors
    topic_weight: chex.Array  # [TOPICS] float32, log of a topic's frequency among users
    cluster_start: chex.Array  # [TOPICS] int32, first id of a topic's range
    cluster_live: chex.Array  # [days, TOPICS] int32, videos of the range uploaded three days ago or earlier
    by_upload: chex.Array  # [V - num_popular] int32, ids in order of upload
    uploaded: chex.Array  # [days] int32, number of `by_upload` that are uploaded by a day
    popular_edges: chex.Array  # [n + 1] int32, strata of the popular ids, with geometric widths (Zipf)
    user_key: chex.Array  # typed key for the users' hidden traits
    behaviour: Behaviour
    items: types.Items  # the videos as agents may see them
    config: WorldConfig = struct.field(pytree_node=False)
    random_share: chex.Array | None = None  # of requests that ask for a random slate; None: contexts do not say so

    def day_index(self, day):
        """Return the row of the per-day tables for a simulated day; nothing new is uploaded after LAST_DAY."""
        return jnp.clip(day, 0, LAST_DAY) - FIRST_DAY
