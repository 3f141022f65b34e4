"""Rankers: policies in the form that the loops of `envs.rollout` serve, as data and pure functions.

A trained method gives a `Ranker`, which is also an `mmrf.Policy`. `policies.as_ranker` turns any other `mmrf.Policy` or
plain function into one. Scoring and remembering are two functions here, so that a loop scores a request once and writes
the feedback once, in O(K). Oracles are a `PrivilegedPolicy`, the only one to which a loop gives the hidden state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmrf_jax import random, types
from mmrf_jax.envs import environment


@struct.dataclass
class Ranker:
    """A ranker as data and pure functions.

    Attributes:
      params: what the functions need.
      start: (params, request, history) -> carry, the user state at the start of a session.
      score: (params, carry, request) -> scores [B, C].
      observe: (params, carry, request, exposure) -> carry, after feedback; O(K), never O(history).
      temperature: scalar; 0 serves the top K, in order; above 0 samples Plackett–Luce on scores / temperature.
    """

    params: Any
    start: Callable = struct.field(pytree_node=False)
    score: Callable = struct.field(pytree_node=False)
    observe: Callable = struct.field(pytree_node=False)
    temperature: chex.Numeric = 0.0

    def initial_carry(self, request: types.Request, history: types.Exposure) -> Any:
        """Return the user state at the start of a session."""
        return self.start(self.params, request, history)

    def scores(self, env_params: Any, state: Any, carry: Any, request: types.Request) -> chex.Array:
        """Return the scores [B, C] of the candidates of a request, without a look at the hidden state."""
        return self.score(self.params, carry, request)

    def next_carry(self, carry: Any, request: types.Request, exposure: types.Exposure) -> Any:
        """Return the user state after feedback."""
        return self.observe(self.params, carry, request, exposure)

    def init(self, obs: environment.Observation) -> Any:
        """Return the carry at the first observation of a session, and its request, as an `mmrf.Policy`."""
        return self.initial_carry(obs.request, obs.history), obs.request

    def apply(self, key: types.Key, obs: environment.Observation, carry: Any) -> tuple[chex.Array, Any]:
        """Return scores [B, C] and the carry with the previous slate, as an `mmrf.Policy`; `carry` as of `init`.

        A temperature above 0 divides the scores and adds Gumbel noise to them.
        """
        first = ~obs.exposure.mask.any(axis=1)
        carry, shown_at = carry
        carry = environment.where(first, carry, self.next_carry(carry, shown_at, obs.exposure))
        scores = self.scores(None, None, carry, obs.request)
        temperature = jnp.asarray(self.temperature, scores.dtype)
        noise = random.to_gumbel(jax.random.uniform(key, scores.shape, scores.dtype, minval=1e-7))
        noisy = scores / jnp.where(temperature > 0, temperature, 1.0) + noise
        return jnp.where(temperature > 0, noisy, scores), (carry, obs.request)


@struct.dataclass
class PrivilegedPolicy:
    """A policy that sees the hidden state: the oracles and the production ranker.

    Attributes:
      score: (the environment's parameters, its state, *data) -> scores [B, C].
      temperature: as of a `Ranker`.
      data: arrays for `score`.
    """

    score: Callable = struct.field(pytree_node=False)
    temperature: chex.Numeric = 0.0
    data: tuple = ()

    def initial_carry(self, request: types.Request, history: types.Exposure) -> tuple[()]:
        """Return the empty carry."""
        return ()

    def scores(self, env_params: Any, state: Any, carry: Any, request: types.Request) -> chex.Array:
        """Return the scores [B, C] by the hidden state."""
        return self.score(env_params, state, *self.data)

    def next_carry(self, carry: Any, request: types.Request, exposure: types.Exposure) -> tuple[()]:
        """Return the empty carry."""
        return ()


@struct.dataclass
class PolicyChoice:
    """One of several policies, selected by an array, so that one compiled rollout serves any of them.

    Attributes:
      policies: the policies.
      index: int32 scalar, selects the policy that ranks.
    """

    policies: tuple[Ranker | PrivilegedPolicy, ...]
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

    def scores(self, env_params: Any, state: Any, carry: tuple, request: types.Request) -> chex.Array:
        """Return the scores [B, C] of the selected policy; no other policy is computed."""
        return self._switch(lambda i: self.policies[i].scores(env_params, state, carry[i], request))

    def next_carry(self, carry: tuple, request: types.Request, exposure: types.Exposure) -> tuple:
        """Return the carries, with the selected policy's after feedback."""

        def chosen(i: int) -> tuple:
            return *carry[:i], self.policies[i].next_carry(carry[i], request, exposure), *carry[i + 1 :]

        return self._switch(chosen)

    def _switch(self, branch: Callable[[int], Any]) -> Any:
        return jax.lax.switch(self.index, [functools.partial(branch, i) for i in range(len(self.policies))])


_SHARPEST = 1e-6  # temperature of best slates, where other slates are sampled


@struct.dataclass
class WithRandomExposures:
    """A policy that answers the requests marked by `types.exposed_at_random` with uniformly random slates.

    Attributes:
      policy: ranks all other requests.
    """

    policy: AnyRanker

    @property
    def temperature(self) -> float:
        """1: `scores` are already divided by the policy's temperature."""
        return 1.0

    def initial_carry(self, request: types.Request, history: types.Exposure) -> Any:
        """Return the policy's carry."""
        return self.policy.initial_carry(request, history)

    def scores(self, env_params: Any, state: Any, carry: Any, request: types.Request) -> chex.Array:
        """Return the policy's scores [B, C] by its temperature, and equal scores at marked requests."""
        scores = self.policy.scores(env_params, state, carry, request)
        scaled = scores / jnp.maximum(self.policy.temperature, _SHARPEST)
        return jnp.where(types.exposed_at_random(request.context)[:, None], 0.0, scaled)

    def next_carry(self, carry: Any, request: types.Request, exposure: types.Exposure) -> Any:
        """Return the policy's carry after feedback."""
        return self.policy.next_carry(carry, request, exposure)


#: What the loops serve.
AnyRanker: TypeAlias = Ranker | PrivilegedPolicy | PolicyChoice | WithRandomExposures


def choices(policies: Mapping[str, Any]) -> dict[str, PolicyChoice]:
    """Return each policy as a choice among all of them, so that they share one compiled rollout."""
    together = tuple(dataclasses.replace(p, temperature=np.float32(p.temperature)) for p in policies.values())
    return {name: PolicyChoice(together, np.int32(i)) for i, name in enumerate(policies)}


def nothing(*_):
    """Return the empty carry; a single function, so that jit treats equal policies as the same."""
    return ()
