"""Shared types: the records that packages exchange.

Letters used in every shape: **B** users (sessions) in a batch, **T** requests in a session, **C** candidates of one
request, **K** videos exposed of them, **H** exposures of the history a user arrives with, **N** agents,
**S** feedback signals, **V** videos of the item set, **D** features.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Items:
    """The platform's view of its V videos: ids and features, never hidden ground truth."""

    author: chex.Array  # [V] int32 in [0, num_authors)
    tag: chex.Array  # [V] int32 in [0, num_tags)
    duration: chex.Array  # [V] float32, seconds
    features: chex.Array  # [V, Di] float32, roughly standardised
    embedding_id: chex.Array  # [V] int32, row in the id table; 0 is the out-of-vocabulary row
    num_embeddings: int = struct.field(pytree_node=False)
    num_authors: int = struct.field(pytree_node=False)
    num_tags: int = struct.field(pytree_node=False)
    dates: chex.Array | None = None  # [days] int32, ascending; None without statistics
    statistics: chex.Array | None = None  # [days + 1, V, F] float32, row i covers the first i dates (`data.statistics`)

    @property
    def num_videos(self) -> int:
        return self.author.shape[0]

    def features_of(self, videos: chex.Array, date: chex.Array | None = None) -> chex.Array:
        """Return features [..., Di + F] of videos [...]: static features, and statistics of the days before a date.

        Args:
          date: [B], for the leading axis of `videos`; None for the newest statistics.
        """
        features = jnp.asarray(self.features)[videos]
        if self.statistics is None:
            return features
        if date is None:
            known = jnp.asarray(self.statistics)[-1][videos]
        else:
            day = jnp.searchsorted(jnp.asarray(self.dates), date)
            known = jnp.asarray(self.statistics)[day.reshape(-1, *(1,) * (videos.ndim - 1)), videos]
        return jnp.concatenate([features, known], axis=-1)


@struct.dataclass
class Exposure:
    """Shown videos, oldest first, and their feedback; `[..., K]` or, for a history, `[..., H]`."""

    videos: chex.Array  # [..., K] int32 video ids
    feedback: chex.Array  # [..., K, S] float32, in the order of the log's signals (`mmrf_jax.Signals`)
    mask: chex.Array  # [..., K] bool, False where nothing was shown


@struct.dataclass
class Request:
    """What the platform observes when a user requests videos."""

    user_id: chex.Array  # [B] int32
    profile: chex.Array  # [B, Du] float32, roughly standardised
    context: chex.Array  # [B, Dx] float32: hour, tab, …; the last column is log1p of the position in the session
    candidates: chex.Array  # [B, C] int32 video ids, all distinct


@struct.dataclass
class SessionBatch:
    """A batch of session segments cut from a log; the training input of every method.

    A segment has T + 1 requests. The last is used for bootstrapping; it is trained on as the first request of the next
    segment. `terminated` and `truncated` describe the session after the request.
    """

    user_id: chex.Array  # [B] int32
    date: chex.Array  # [B] int32
    profile: chex.Array  # [B, Du] float32
    history: Exposure  # [B, H] exposures before the first request of the segment
    context: chex.Array  # [B, T+1, Dx] float32
    candidates: chex.Array  # [B, T+1, C] int32
    slate: chex.Array  # [B, T+1, K] int32, positions in `candidates`, in the order shown
    slate_mask: chex.Array  # [B, T+1, K] bool
    feedback: chex.Array  # [B, T+1, K, S] float32
    log_propensity: chex.Array  # [B, T+1] float32, of the slate under the logging policy; NaN where unknown
    mask: chex.Array  # [B, T+1] bool, False where there is no request
    terminated: chex.Array  # [B, T+1] bool, the user left after this request
    truncated: chex.Array  # [B, T+1] bool, the log ends here but the session did not
    weight: chex.Array | None = None  # [B, T+1, C] float32, number of candidates that each represents; None for 1 each

    @property
    def num_requests(self) -> int:
        """T, the number of requests of a segment that are trained on."""
        return self.mask.shape[-1] - 1

    def without_last(self) -> SessionBatch:
        """Return the T requests that are trained on, without the bootstrap request."""
        at_requests = {name: x[:, :-1] for name in _OF_REQUESTS if (x := getattr(self, name)) is not None}
        return dataclasses.replace(self, **at_requests)

    def loss_masks(self) -> LossMasks:
        """Compute what enters the losses, as weights."""
        request = self.mask[:, :-1]
        exposed = self.slate_mask[:, :-1] & request[..., None]
        known = request & (self.terminated[:, :-1] | self.mask[:, 1:])
        return LossMasks(*(x.astype(jnp.float32) for x in (exposed, request, known)))

    def next_context(self) -> chex.Array:
        """Return the context [B, T, Dx] of each next request: the logged one, or this one a position later."""
        context = jnp.asarray(self.context)
        later = context[:, :-1].at[..., -1].set(jnp.log1p(jnp.expm1(context[:, :-1, -1]) + 1.0))
        return jnp.where(self.mask[:, 1:, None], context[:, 1:], later)


@struct.dataclass
class LossMasks:
    """Masks of what enters the losses; the last request of a segment never does."""

    exposure: chex.Array  # [B, T, K] float32
    request: chex.Array  # [B, T] float32
    next_known: chex.Array  # [B, T] float32, requests whose continuation is known: termination, or the next request

    def counts(self) -> LossMasks:
        """Return the sum of each mask, at least 1: what masked sums are divided by."""
        return jax.tree.map(lambda mask: jnp.maximum(mask.sum(), 1.0), self)


_OF_REQUESTS = (
    *("context", "candidates", "slate", "slate_mask", "feedback", "log_propensity"),
    *("mask", "terminated", "truncated", "weight"),
)


def exposed_at_random(context: chex.Array) -> chex.Array:
    """Return whether requests [...] with context [..., Dx] were exposed at random, where logs say so first."""
    return context[..., 0] > 0.5


def as_if_at_random(context: chex.Array) -> chex.Array:
    """Return the context [..., Dx] of the same requests, were they exposed at random, where logs say so first."""
    return jnp.asarray(context).at[..., 0].set(1.0)


@struct.dataclass
class FeedbackPrediction:
    """A feedback model's predictions for all candidates, raw as in `models.heads.Prediction`."""

    feedback: chex.Array  # [B, T+1, S, C] float32
    continue_logit: chex.Array  # [B, T+1] float32
    continue_item_logit: chex.Array  # [B, T+1, C] float32


@struct.dataclass
class CounterfactualSlates:
    """Slates of unshown videos at the requests of a batch, with feedback simulated by a feedback model."""

    slates: chex.Array  # [B, T+1, M, K] int32, positions in the request's candidates, all distinct
    expected: chex.Array  # [B, T+1, M, K, S] float32, expected feedback: probabilities, and seconds
    uncertainty: chex.Array  # [B, T+1, M, K, S] float32, divided by its mean on impressions
    sampled: chex.Array  # [B, T+1, M, K, S] float32, feedback sampled from the model, for the next state
    continue_prob: chex.Array  # [B, T+1, M] float32, probability of another request after each slate
    pool: FeedbackPrediction  # for all candidates of the same requests


PyTree = chex.ArrayTree
Key = jax.Array


def make_key(seed: int) -> Key:
    """Return the key of a seed. The same seed gives the same numbers under any default generator of JAX."""
    return jax.random.key(seed, impl="threefry2x32")
