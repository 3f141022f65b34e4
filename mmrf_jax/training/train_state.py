"""The state of a run, what a round's end makes of it, and where its arrays are on the devices."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from mmrf_jax.agents.mmrf import agent_state
from mmrf_jax.checkpointing import leaves
from mmrf_jax.models import embedding_table, embeddings
from mmrf_jax.models.feedback_model.network import FeedbackState
from mmrf_jax.parallel.partitioner import Partitioner


@struct.dataclass
class TrainState:
    """The complete state of a run, all of it checkpointed."""

    agents: agent_state.AgentState
    feedback: FeedbackState | None  # None if no feedback model is fitted
    behavior_params: Any  # {"params", "tables"} of the agents that collected this round's log; None if logs are given
    round: chex.Array  # int32, from 0; equals the number of rounds at the end
    done: chex.Array  # int32, completed steps of this round: first the fit, then the updates
    logged: chex.Array  # [2] int32, sessions and requests of the newest log


def infer_shardings(state: TrainState, partitioner: Partitioner) -> TrainState:
    """Return the state's shapes with shardings: large embedding tables split by rows, everything else replicated.

    Lookups and updates of a split table cost one all-reduce of the embeddings that the batch looks up; nothing of the
    size of the table is communicated (`tests/parallel/test_split_tables.py`).
    """

    def place(x: Any):
        split = isinstance(x, embedding_table.Table) and embeddings.is_split(x, partitioner.num_devices)
        return leaves.targets(x, partitioner.data_sharding if split else partitioner.replicated_sharding)

    return jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, embedding_table.Table))


def behavior_params_of(agents: agent_state.AgentState) -> dict[str, Any]:
    """Return a copy of what the agents rank by, as `TrainState.behavior_params`."""
    return jax.tree.map(jnp.copy, {"params": agents.params, "tables": agents.tables})


def model_of(state: TrainState) -> FeedbackState:
    """Return the feedback model of a run that fits one (`TrainConfig.use_feedback_model`)."""
    assert state.feedback is not None
    return state.feedback


@functools.partial(jax.jit, donate_argnums=0)
def next_round(state: TrainState) -> TrainState:
    """Advance to the next round; the current agents become the policy that collects its log."""
    behavior_params = None if state.behavior_params is None else behavior_params_of(state.agents)
    return dataclasses.replace(
        state, behavior_params=behavior_params, round=state.round + 1, done=jnp.zeros_like(state.done)
    )


def behavior_state(state: TrainState) -> agent_state.AgentState:
    """Return the agents with the parameters that they had at the start of this round."""
    return dataclasses.replace(
        state.agents, params=state.behavior_params["params"], tables=state.behavior_params["tables"]
    )
