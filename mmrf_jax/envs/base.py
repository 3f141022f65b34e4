"""The interface of simulators, which return feedback on slates: the world and the learned feedback model.

A simulator is three pure functions over batches of users:

    reset(key, user_ids, day, params)  -> state, Request, history (Exposure [B, H])
    step(key, state, exposed, params)  -> state, StepResult
    next_visit(key, state, params)     -> state, days until the user's next visit [B] (int32)

All randomness comes from `key`, folded with the user's position in the session and the user id. So results do not
depend on the order of the users or on how they are split over calls or devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmrf_jax import types
from mmrf_jax.signals import Signals


@struct.dataclass
class StepResult:
    """The result of serving a slate."""

    exposure: types.Exposure  # [B, K], with feedback
    request: types.Request  # the next request; meaningless if the session has ended
    terminated: chex.Array  # [B] bool, the user left
    truncated: chex.Array  # [B] bool, the session reached its maximum length


class Simulator(NamedTuple):
    """The three functions, the signals of their feedback, their parameters, and the items that a platform sees."""

    reset: Callable[..., tuple[Any, types.Request, types.Exposure]]
    step: Callable[..., tuple[Any, StepResult]]
    next_visit: Callable[..., tuple[Any, chex.Array]]
    signals: Signals
    params: Any
    items: types.Items

    @property
    def static(self):
        """The fields that are static arguments of jitted functions; `Simulator(*sim.static, *sim.data)` is the same."""
        return self[:4]

    @property
    def data(self):
        """The other fields."""
        return self[4:]


@struct.dataclass
class Policy:
    """A ranker as data and pure functions; `envs.rollout` serves it in any simulator.

    Attributes:
      params: what the functions need.
      init: (params, request, history) -> carry, the user state at the start of a session.
      score: (params, carry, request) -> scores [B, C].
      observe: (params, carry, request, exposure) -> carry, after feedback; O(K), never O(history).
      temperature: scalar; 0 serves the top K, in order; above 0 samples Plackett–Luce on scores / temperature.
    """

    params: Any
    init: Callable = struct.field(pytree_node=False)
    score: Callable = struct.field(pytree_node=False)
    observe: Callable = struct.field(pytree_node=False)
    temperature: chex.Numeric = 0.0

    def initial_carry(self, request: types.Request, history: types.Exposure) -> Any:
        """Return the user state at the start of a session."""
        return self.init(self.params, request, history)

    def scores(self, sim_params: Any, state: Any, carry: Any, request: types.Request) -> chex.Array:
        """Return the scores [B, C] of the candidates of a request; no policy but a privileged one reads `state`."""
        return self.score(self.params, carry, request)

    def next_carry(self, carry: Any, request: types.Request, exposure: types.Exposure) -> Any:
        """Return the user state after feedback."""
        return self.observe(self.params, carry, request, exposure)


@struct.dataclass
class PrivilegedPolicy(Policy):
    """A policy that sees the simulator's hidden state: the oracles and the production ranker.

    Attributes:
      score: (simulator's parameters, its state) -> scores [B, C].
    """

    def scores(self, sim_params: Any, state: Any, carry: Any, request: types.Request) -> chex.Array:
        """Return the scores [B, C] by the hidden state."""
        return self.score(sim_params, state)


@struct.dataclass
class PolicyChoice:
    """One of several policies, selected by an array, so that one compiled rollout serves any of them.

    Attributes:
      policies: the policies.
      index: int32 scalar, selects the policy that ranks.
    """

    policies: tuple[Policy, ...]
    index: chex.Numeric

    @property
    def temperature(self) -> chex.Array:
        """The temperature of the selected policy."""
        return jnp.stack([jnp.asarray(policy.temperature, jnp.float32) for policy in self.policies])[self.index]

    def initial_carry(self, request: types.Request, history: types.Exposure) -> tuple:
        """Return one carry per policy; all but the selected one are zeros."""

        def chosen(i: int) -> tuple:
            carries = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape) for shape in shapes]
            carries[i] = self.policies[i].initial_carry(request, history)
            return tuple(carries)

        shapes = [jax.eval_shape(policy.initial_carry, request, history) for policy in self.policies]
        return self._switch(chosen)

    def scores(self, sim_params: Any, state: Any, carry: tuple, request: types.Request) -> chex.Array:
        """Return the scores [B, C] of the selected policy; no other policy is computed."""
        return self._switch(lambda i: self.policies[i].scores(sim_params, state, carry[i], request))

    def next_carry(self, carry: tuple, request: types.Request, exposure: types.Exposure) -> tuple:
        """Return the carries, with the selected policy's after feedback."""

        def chosen(i: int) -> tuple:
            return *carry[:i], self.policies[i].next_carry(carry[i], request, exposure), *carry[i + 1 :]

        return self._switch(chosen)

    def _switch(self, branch: Callable[[int], Any]) -> Any:
        return jax.lax.switch(self.index, [functools.partial(branch, i) for i in range(len(self.policies))])


def choices(policies: Mapping[str, Policy]) -> dict[str, PolicyChoice]:
    """Return each policy as a choice among all of them, so that they share one compiled rollout."""
    together = tuple(dataclasses.replace(p, temperature=np.float32(p.temperature)) for p in policies.values())
    return {name: PolicyChoice(together, np.int32(i)) for i, name in enumerate(policies)}


def privileged_policy(score: Callable, temperature: float) -> PrivilegedPolicy:
    """Return a policy that ranks by hidden ground truth: `score(simulator params, simulator state) -> [B, C]`."""
    return PrivilegedPolicy((), nothing, score, nothing, temperature)


def nothing(*_):
    """Return the empty carry; a single function, so that jit treats equal policies as the same."""
    return ()
