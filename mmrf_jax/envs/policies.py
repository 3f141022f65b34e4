"""The protocol of policies, and `mmrf.rollout`: a policy serves whole sessions of many users.

A policy is a `Policy`, which remembers what it likes of a session, or a function `(key, obs) -> scores [B, C]`. The K
highest scores are shown, in order. Trained rankers (`envs.rankers.Ranker`) are policies too. `rollout` traces any other
one for one user at a time and maps it over the users, so that no user's outcome depends on another's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmrf_jax import types
from mmrf_jax.envs import collect, environment
from mmrf_jax.envs import rollout as rollouts
from mmrf_jax.envs.environment import Observation
from mmrf_jax.envs.rankers import AnyRanker, PolicyChoice, PrivilegedPolicy, Ranker
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


def rollout(
    env: environment.Environment,
    policy: PolicyFunction | Policy | PrivilegedPolicy,
    num_users: int = 10_000,
    *,
    key: types.Key,
    params: Any = None,
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
      ...     return env.items.duration[obs.candidates]
      >>> metrics = mmrf.rollout(env, longest, num_users=50, key=jax.random.key(0))
      >>> metrics["watch_time"].shape, bool((metrics["depth"] == 3 * metrics["requests"]).all())
      ((50,), True)
    """
    if num_users < 1:
        raise ValueError(f"num_users is {num_users}; use 1 or more")
    if first_user < 0 or first_user + num_users > 2**31 - 1:
        raise ValueError(f"users {first_user} … {first_user + num_users - 1} are not all in [0, 2^31 - 1)")
    environment.check_key(key)
    env = env if params is None else env.replace(default_params=params)  # type: ignore[attr-defined]
    sums = _sums(
        env,
        as_ranker(policy, env.items, jax.random.fold_in(key, 5), env.slate_size),
        key,
        np.int32(first_user),
        np.int32(day),
        num_users=num_users,
        slots=min(collect.slots_for(num_users), num_users),
    )
    columns = zip(rollouts.user_metrics(env.signals), np.asarray(sums).T, strict=True)
    return {"user_id": first_user + np.arange(num_users), **dict(columns)}


def as_ranker(policy: Any, items: types.Items, key: types.Key, k: int) -> AnyRanker:
    """Return a policy as one that `envs.rollout` serves.

    Args:
      policy: as in `rollout`.
      items: the videos.
      key: typed key of the policy's randomness.
      k: number of videos of a slate.

    Raises:
      ValueError: if it is no policy.
    """
    if isinstance(policy, Ranker | PrivilegedPolicy | PolicyChoice):
        return policy
    return Ranker(_Adapted(_as_data(policy), items, key, k), _start, _score, _observe)


@programs.program(calls="many", static_argnames=("num_users", "slots"))
def _sums(
    env: environment.Environment, policy: AnyRanker, key, first_user, day, *, num_users: int, slots: int
) -> chex.Array:
    return rollouts.rollout(env, policy, key, first_user, day, num_users=num_users, slots=slots)[0]


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
class _Adapted:
    """The parameters of the `Ranker` of a `Policy`."""

    policy: Any
    items: types.Items
    key: types.Key
    slate_size: int = struct.field(pytree_node=False)


@struct.dataclass
class _Memory:
    """Its carry of B sessions."""

    history: types.Exposure  # [B, H]
    exposure: types.Exposure  # [B, K]
    position: chex.Array  # [B] int32
    own: Any  # of the policy


def _start(adapted: _Adapted, request: types.Request, history: types.Exposure) -> _Memory:
    exposure = environment.nothing_shown(history, adapted.slate_size)
    obs = environment.observe(adapted.items, request, history, exposure)
    own = _per_user(_value(adapted.policy).init, obs)
    return _Memory(history, exposure, jnp.zeros(request.user_id.shape, jnp.int32), own)


def _score(adapted: _Adapted, carry: _Memory, request: types.Request) -> chex.Array:
    return _apply(adapted, carry, request)[0]


def _observe(adapted: _Adapted, carry: _Memory, request: types.Request, exposure: types.Exposure) -> _Memory:
    own = _apply(adapted, carry, request)[1]  # computed for the scores already: XLA merges the two
    return _Memory(environment.append(carry.history, exposure), exposure, carry.position + 1, own)


def _apply(adapted: _Adapted, carry: _Memory, request: types.Request) -> tuple[chex.Array, Any]:
    obs = environment.observe(adapted.items, request, carry.history, carry.exposure)

    def key_of(position: chex.Array, user: chex.Array) -> types.Key:
        return jax.random.fold_in(jax.random.fold_in(adapted.key, position), user)

    def apply(key: types.Key, obs: Observation, own: Any) -> tuple[chex.Array, Any]:
        scores, own = _value(adapted.policy).apply(key[0], obs, own)
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
