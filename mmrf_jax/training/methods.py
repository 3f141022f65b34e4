"""The rankers that can be trained, by name: how each learns, serves and scores."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mmrf_jax import types
from mmrf_jax.agents import networks, policy, update
from mmrf_jax.agents import state as st
from mmrf_jax.agents.config import AgentConfig
from mmrf_jax.baselines import myopic
from mmrf_jax.encoders import representation as rep
from mmrf_jax.encoders import tables as tb
from mmrf_jax.simulators import base


class Method(NamedTuple):
    """A trainable ranker."""

    update: Callable[..., tuple[st.AgentState, dict[str, chex.Array]]]
    make_policy: Callable[..., base.Policy]
    score: Callable[..., chex.Array]  # (config, params, Representation, items [B, T+1, C, D]) -> [B, T+1, N, C]
    signals: Callable[[AgentConfig], tuple[str, ...]]  # of the score columns
    simulates: bool  # whether `update` takes what a feedback model says (`types.Simulated`)


def _actor_scores(config: AgentConfig, params: Any, r: rep.Representation, items) -> chex.Array:
    return networks.Actor(config).apply(params["actor"], r.z, r.memory_mean, items).scores


def _watch_scores(config: AgentConfig, params: Any, r: rep.Representation, items) -> chex.Array:
    out = networks.Critic(config).apply(params["critic"], r.z, r.memory_mean, items)
    return out.feedback[..., types.WATCH_TIME :, :]


METHODS = {
    "mmrf": Method(update.update, policy.make, _actor_scores, lambda config: config.signals, True),
    "myopic": Method(myopic.update, myopic.make, _watch_scores, lambda config: ("watch_time",), False),
}


def get(name: str) -> Method:
    """The method of a name.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; use --config.method= one of {', '.join(METHODS)}")
    return METHODS[name]


@functools.partial(jax.jit, static_argnames=("config", "method"))
def score_candidates(
    state: st.AgentState, batch: types.SessionBatch, items: types.Items, config: AgentConfig, method: str
) -> chex.Array:
    """Scores [B, T+1, N, C] of all candidates of a batch of segments, without dropout."""
    rows = tb.lookup(state.tables, rep.ids(batch, items))
    r = rep.represent(config, state.params["encoder"], rows, batch, items, None)
    candidates = tb.encode_videos(config, state.params["encoder"], state.tables, items, batch.candidates)
    return METHODS[method].score(config, state.params, r, candidates)


@functools.partial(jax.jit, static_argnames=("config", "method"))
def score_batch(
    state: st.AgentState, batch: types.SessionBatch, items: types.Items, config: AgentConfig, method: str
) -> chex.Array:
    """Scores [B, T+1, N, K] of what a batch of segments showed, without dropout; for `evaluation.offline`."""
    scores = score_candidates(state, batch, items, config, method)
    return jnp.take_along_axis(scores, batch.slate[..., None, :], axis=-1)
