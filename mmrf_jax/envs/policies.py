"""Public policies, and `mmrf.rollout`: a policy serves whole sessions of many users.

A policy is a function `(key, obs) -> scores [B, C]`, of which the K highest are shown in order, or a `Policy`, which
remembers what it likes of a session. `rollout` traces it for one user at a time and maps it over the users, so that no
user's outcome depends on another's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmrf_jax import random, types
from mmrf_jax.envs import base, collect, environment
from mmrf_jax.envs import rollout as rollouts
from mmrf_jax.envs.environment import Observation
from mmrf_jax.parallel import programs

Carry = TypeVar("Carry")


@runtime_checkable
class Policy(Protocol[Carry]):
    """A policy with a carry. One that is a pytree (`flax.struct.dataclass`) compiles once for all its parameters.

    Example:
      A user's mean watch time per video of the session, as a carry:

      >>> class Mean:
      ...     def init(self, obs):
      ...         return jnp.zeros(obs.user_id.shape)
      ...     def apply(self, key, obs, carry):
      ...         carry = 0.9 * carry + 0.1 * obs.exposure.feedback[..., -1].mean(axis=1)
      ...         return carry[:, None] * obs.features[..., 0], carry
      >>> isinstance(Mean(), Policy)
      True
    """

    def init(self, obs: Observation) -> Carry:
        """Return the carry (leading axis B) at the first observation of a session."""

    def apply(self, key: types.Key, obs: Observation, carry: Carry) -> tuple[chex.Array, Carry]:
        """Return scores [B, C] and the carry; `obs.exposure` is the feedback since the last call."""


PolicyFunction = Callable[[types.Key, Observation], chex.Array]


@struct.dataclass
class RankingPolicy:
    """A policy of `envs.base` in the public protocol, for example a trained ranker.

    Attributes:
      policy: whose temperature above 0 adds Gumbel noise to the scores, which are divided by it.
    """

    policy: base.Policy

    def init(self, obs: Observation) -> Any:
        """Return the memory of the user's history."""
        return self.policy.initial_carry(_request(obs), obs.history)

    def apply(self, key: types.Key, obs: Observation, carry: Any) -> tuple[chex.Array, Any]:
        """Return scores [B, C] and the memory, with the previous slate."""
        after = self.policy.next_carry(carry, _request(obs), obs.exposure)
        first = ~obs.exposure.mask.any(axis=1)

        def unless_first(new: chex.Array, old: chex.Array) -> chex.Array:
            return jnp.where(first.reshape(-1, *(1,) * (new.ndim - 1)), old, new)

        carry = jax.tree.map(unless_first, after, carry)
        scores = self.policy.scores(None, None, carry, _request(obs))
        temperature = jnp.asarray(self.policy.temperature, scores.dtype)
        noise = random.to_gumbel(jax.random.uniform(key, scores.shape, scores.dtype, minval=1e-7))
        return jnp.where(temperature > 0, scores / jnp.where(temperature > 0, temperature, 1.0) + noise, scores), carry


def rollout(
    env: environment.Environment,
    policy: PolicyFunction | Policy | base.Policy,
    num_users: int = 10_000,
    *,
    key: types.Key,
    params: environment.EnvParams | None = None,
    first_user: int = 0,
    day: int = 0,
) -> dict[str, np.ndarray]:
    """Serve one whole session to each user, and sum up what happened.

    Args:
      env: environment.
      policy: `(key, obs) -> scores [B, C]`, a `Policy`, `run.policy`, or one of `env.reference_policies`.
      num_users: users `first_user … first_user + num_users - 1`; a compile-time size.
      key: typed key; equal keys pair the users of two policies.
      params: of the environment; None for `env.default_params`.
      day: of the sessions.

    Returns:
      [num_users] arrays: `user_id`; per session `watch_time` (seconds), `depth` (videos shown), `requests`, the number
      of each binary signal, `ild` (intra-list diversity, summed over requests); `returned` (1 if the user comes back
      within a day), `next_visit` (days until then) and `truncated`.

    Raises:
      ValueError: for fewer users than 1, user ids above 2^31 - 1, or scores of another shape.

    Example:
      >>> import mmrf_jax as mmrf
      >>> env = mmrf.make("short-video", num_videos=3_000, num_candidates=20, slate_size=3, max_requests=4)
      >>> def longest(key, obs):
      ...     return env.simulator.items.duration[obs.candidates]
      >>> metrics = mmrf.rollout(env, longest, num_users=50, key=jax.random.key(0))
      >>> metrics["watch_time"].shape, bool((metrics["depth"] == 3 * metrics["requests"]).all())
      ((50,), True)
    """
    if num_users < 1:
        raise ValueError(f"num_users is {num_users}; use 1 or more")
    if first_user < 0 or first_user + num_users > 2**31 - 1:
        raise ValueError(f"users {first_user} … {first_user + num_users - 1} are not all in [0, 2^31 - 1)")
    environment.check_key(key)
    params = env.default_params if params is None else params
    served: Any = policy.policy if isinstance(policy, RankingPolicy) else policy
    if not isinstance(served, base.Policy | base.PolicyChoice):
        served = _Served(_as_data(served), params.items, jax.random.fold_in(key, 5), env.slate_size)
    sums = _sums(
        env.simulator._replace(params=None, items=None),  # type: ignore[arg-type]
        params,
        served,
        key,
        np.int32(first_user),
        np.int32(day),
        num_users=num_users,
        slots=min(collect.slots_for(num_users), num_users),
        k=env.slate_size,
    )
    columns = zip(rollouts.user_metrics(env.signals), np.asarray(sums).T, strict=True)
    return {"user_id": first_user + np.arange(num_users), **dict(columns)}


@programs.program(often=True, static_argnames=("functions", "num_users", "slots", "k"))
def _sums(functions, params, policy, key, first_user, day, *, num_users: int, slots: int, k: int) -> chex.Array:
    simulator = functions._replace(params=params.simulator, items=params.items)
    return rollouts.rollout(simulator, policy, key, first_user, day, num_users=num_users, slots=slots, k=k)[0]


@struct.dataclass
class _Constant:
    """An object that is no pytree, as one without leaves: a program is compiled for each."""

    value: Any = struct.field(pytree_node=False)


@struct.dataclass
class _Stateless:
    """A function (key, obs) -> scores as a `Policy`."""

    function: Any

    def init(self, obs: Observation) -> tuple[()]:
        return ()

    def apply(self, key: types.Key, obs: Observation, carry: tuple[()]) -> tuple[chex.Array, tuple[()]]:
        return _value(self.function)(key, obs), ()


def _as_data(policy: Any) -> Any:
    """Return a policy as a pytree; see `_value`."""
    held = policy if not jax.tree_util.all_leaves([policy]) else _Constant(policy)
    if isinstance(policy, Policy):
        return held
    if not callable(policy):
        raise ValueError(f"policy is {policy!r}; give a function (key, obs) -> scores [B, C], or an mmrf.Policy")
    return _Stateless(held)


def _value(held: Any) -> Any:
    return held.value if isinstance(held, _Constant) else held


@struct.dataclass
class _Memory:
    """What `_Served` carries of B sessions."""

    history: types.Exposure  # [B, H]
    exposure: types.Exposure  # [B, K]
    position: chex.Array  # [B] int32
    own: Any  # of the policy


@struct.dataclass
class _Served:
    """A public policy as `envs.rollout` serves it, see `base.Policy`; it shows the K highest scores."""

    policy: Any
    items: types.Items
    key: types.Key
    slate_size: int = struct.field(pytree_node=False)
    temperature: chex.Numeric = 0.0

    def initial_carry(self, request: types.Request, history: types.Exposure) -> _Memory:
        exposure = environment.nothing_shown(history, self.slate_size)
        obs = environment.observe(self.items, request, history, exposure)
        own = _per_user(_value(self.policy).init, obs)
        return _Memory(history, exposure, jnp.zeros(request.user_id.shape, jnp.int32), own)

    def scores(self, sim_params: Any, state: Any, carry: _Memory, request: types.Request) -> chex.Array:
        return self._apply(carry, request)[0]

    def next_carry(self, carry: _Memory, request: types.Request, exposure: types.Exposure) -> _Memory:
        own = self._apply(carry, request)[1]  # computed for the scores already: XLA merges the two
        return _Memory(environment.append(carry.history, exposure), exposure, carry.position + 1, own)

    def _apply(self, carry: _Memory, request: types.Request) -> tuple[chex.Array, Any]:
        obs = environment.observe(self.items, request, carry.history, carry.exposure)

        def key_of(position: chex.Array, user: chex.Array) -> types.Key:
            return jax.random.fold_in(jax.random.fold_in(self.key, position), user)

        def apply(key: types.Key, obs: Observation, own: Any) -> tuple[chex.Array, Any]:
            scores, own = _value(self.policy).apply(key[0], obs, own)
            if jnp.shape(scores) != obs.candidates.shape:
                raise ValueError(
                    f"the policy returned scores of shape {jnp.shape(scores)} for candidates of shape "
                    f"{obs.candidates.shape}; return one score per candidate, [B, C]"
                )
            return scores, own

        return _per_user(apply, jax.vmap(key_of)(carry.position, request.user_id), obs, carry.own)


def _per_user(function: Callable[..., Any], *args: Any) -> Any:
    """Map a function of arrays [B, ...] over users, as batches of one."""

    def one(*args: Any) -> Any:
        return jax.tree.map(lambda x: x[0], function(*jax.tree.map(lambda x: x[None], args)))

    return jax.vmap(one)(*args)


def _request(obs: Observation) -> types.Request:
    return types.Request(obs.user_id, obs.profile, obs.context, obs.candidates)
