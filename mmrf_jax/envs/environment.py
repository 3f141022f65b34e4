"""The protocol of environments: sessions of B users, in the convention of JAX.

    env = mmrf.make("short-video", num_videos=5_000, num_candidates=40, slate_size=6)
    params = env.default_params
    obs, state = env.reset(key, params, user_ids=jnp.arange(64))
    obs, state, reward, terminated, truncated, info = env.step(key, state, slate, params)

`mmrf.make` returns the same object that training, A/B tests and the collection of logs use.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mmrf_jax import types
from mmrf_jax.signals import Signals

if TYPE_CHECKING:
    from mmrf_jax.envs.rankers import PrivilegedPolicy, Ranker

_MAX_USER = 2**31 - 1


@struct.dataclass
class Observation:
    """What an agent sees of B users who request videos."""

    user_id: chex.Array  # [B] int32
    profile: chex.Array  # [B, Du] float32, roughly standardised
    context: chex.Array  # [B, Dx] float32; the last column is log1p of the requests of the session so far
    candidates: chex.Array  # [B, C] int32 video ids, all distinct
    features: chex.Array  # [B, C, Di] float32, the candidates' features that the platform knows
    history: types.Exposure  # [B, H], the last H exposures, oldest first: before the session, then in it
    exposure: types.Exposure  # [B, K], the previous slate with its feedback; mask False at the first request

    @property
    def request(self) -> types.Request:
        """The request alone."""
        return types.Request(self.user_id, self.profile, self.context, self.candidates)


@struct.dataclass
class StepResult:
    """The result of a slate, as `Environment.step_env` returns it."""

    exposure: types.Exposure  # [B, K], with feedback
    request: types.Request  # the next request; meaningless if the session has ended
    terminated: chex.Array  # [B] bool, the user left
    truncated: chex.Array  # [B] bool, the session reached its maximum length


@struct.dataclass
class SessionState:
    """The state of B sessions of `Environment.reset` and `step`."""

    hidden: Any  # of `reset_env` and `step_env`; no policy sees it but an oracle
    request: types.Request
    history: types.Exposure  # [B, H]
    exposure: types.Exposure  # [B, K]
    terminated: chex.Array  # [B] bool
    truncated: chex.Array  # [B] bool


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape (without the axis of users), dtype and bounds of an array.

    Attributes:
      low, high: smallest and largest value, both allowed; they broadcast to `shape`.
    """

    shape: tuple[int, ...]
    dtype: Any
    low: Any = -np.inf
    high: Any = np.inf

    def contains(self, x: Any) -> bool:
        """Return whether an array [..., *shape] has this shape, dtype and bounds."""
        x = np.asarray(x)
        fits = x.shape[x.ndim - len(self.shape) :] == self.shape and x.dtype == self.dtype
        return bool(fits and np.all(x >= self.low) and np.all(x <= self.high))


class Environment(struct.PyTreeNode, abc.ABC):
    """Sessions of B users whom an agent shows slates of K of C candidates.

    Observation: see `Observation`, and `observation_spec` for sizes and bounds.
    Action: slate [B, K] int32, positions among `obs.candidates`, in the order shown.
    Reward: [B] float32, seconds of watch time (of `signals.main`) that the slate earned.
    Termination: [B] bool, the user left.
    Truncation: [B] bool, the session reached its maximum length.
    Info: `feedback` [B, K, S] float32 in the order of `signals`, `mask` [B, K] bool (what was shown), `invalid` [B]
      int32 (entries of the slate that were replaced).

    An environment defines three pure functions, `reset_env`, `step_env` and `next_visit`. `reset` and `step` are the
    layer on them for agents: observations with a history that moves on with the session, valid slates, and sessions
    that stay ended. As in Gymnax, loops that need none of this call the three functions: `envs.rollout` refills the
    slots of ended sessions and selects valid slates itself, so it would pay in every step for a window [B, H] and for
    a selection over the whole state (of the feedback model, all memories) without any use of them.

    There is no autoreset: a step after the end has reward 0 and changes nothing, and its flags stay set, until `reset`.
    An entry of a slate that is out of range or repeats an earlier one is left out; the following ones move up, and the
    first candidates that are not in the slate fill the end. So repeats cannot earn twice. This holds under jit too.

    `reset` and `step` compile themselves at their first use with a shape, and work inside `jit`, `vmap` over keys and
    `scan`. An environment is itself a pytree, whose leaves are those of `default_params`.

    All randomness comes from `key`, the user id, the day and the number of requests so far. So one key serves all
    steps of a session, and what happens to a user depends on no other user of the batch.

    Attributes:
      default_params: the parameters to begin with, a pytree with the attribute `items`, the videos as agents may see
        them; the rest is hidden ground truth.
      signals: names and kinds of the feedback, S of them.
      slate_size: K.
    """

    default_params: Any
    signals: Signals = struct.field(pytree_node=False)
    slate_size: int = struct.field(pytree_node=False)

    @abc.abstractmethod
    def reset_env(
        self, key: types.Key, params: Any, user_ids: chex.Array, day: chex.Numeric
    ) -> tuple[types.Request, types.Exposure, Any]:
        """Start a session of each user.

        Args:
          key: typed key.
          params: `default_params`, or changed ones.
          user_ids: [B] int32.
          day: of the sessions.

        Returns:
          The first request of each user, the history that the user arrives with [B, H], and the hidden state.
        """

    @abc.abstractmethod
    def step_env(self, key: types.Key, state: Any, slate: chex.Array, params: Any) -> tuple[StepResult, Any]:
        """Show slates [B, K] of distinct positions to users whose sessions have not ended.

        Returns:
          The result and the next hidden state.
        """

    @abc.abstractmethod
    def next_visit(self, key: types.Key, state: Any, params: Any) -> chex.Array:
        """Return the days [B] int32 until the next visit of users whose sessions have ended."""

    @property
    def reference_policies(self) -> Mapping[str, PrivilegedPolicy | Ranker]:
        """Policies that see hidden ground truth, by name; `mmrf.rollout` serves them."""
        return {}

    @property
    def items(self) -> types.Items:
        """The videos of `default_params`."""
        return self.default_params.items

    def with_items(self, items: types.Items) -> Any:
        """Return the environment with the same videos placed elsewhere, such as on all devices."""
        return self.replace(default_params=self.default_params.replace(items=items))  # type: ignore[attr-defined]

    @property
    def num_candidates(self) -> int:
        """C, the number of candidates of a request."""
        return self._shapes.candidates.shape[1]

    @functools.cached_property
    def observation_spec(self) -> Observation:
        """An `Observation` of `ArraySpec`."""
        videos, kinds = self.items.num_videos, [signal.kind for signal in self.signals.signals]
        low = np.array([-np.inf if kind == "value" else 0.0 for kind in kinds], np.float32)
        high = np.array([1.0 if kind == "binary" else np.inf for kind in kinds], np.float32)

        def spec(x: jax.ShapeDtypeStruct, low: Any = -np.inf, high: Any = np.inf) -> ArraySpec:
            return ArraySpec(x.shape[1:], np.dtype(x.dtype), low, high)

        def exposure(x: types.Exposure) -> types.Exposure:
            return types.Exposure(spec(x.videos, 0, videos - 1), spec(x.feedback, low, high), spec(x.mask, False, True))

        x = self._shapes
        return Observation(
            user_id=spec(x.user_id, 0, _MAX_USER),
            profile=spec(x.profile),
            context=spec(x.context),
            candidates=spec(x.candidates, 0, videos - 1),
            features=spec(x.features),
            history=exposure(x.history),
            exposure=exposure(x.exposure),
        )

    @property
    def action_spec(self) -> ArraySpec:
        """Slates [K]: positions in [0, C)."""
        return ArraySpec((self.slate_size,), np.dtype(np.int32), 0, self.num_candidates - 1)

    def reset(
        self, key: types.Key, params: Any, user_ids: chex.Array, day: chex.Numeric = 0
    ) -> tuple[Observation, SessionState]:
        """Start a session of each user.

        Args:
          key: typed key, such as `jax.random.key(0)`.
          params: `default_params`, or changed ones.
          user_ids: [B] int32, 0 or more; an id is the same user in every session.
          day: of the sessions, from 0 on.

        Returns:
          The first observation of each user, and the state of the sessions.

        Raises:
          ValueError: for a raw key, or user ids that are no vector of whole numbers.
        """
        check_key(key)
        user_ids = jnp.asarray(user_ids)
        if user_ids.ndim != 1 or not user_ids.size or not jnp.issubdtype(user_ids.dtype, jnp.integer):
            raise ValueError(
                f"user_ids has shape {user_ids.shape} and dtype {user_ids.dtype}; give whole numbers [B], "
                "such as jnp.arange(64)"
            )
        return _reset(self._static, key, params, user_ids.astype(jnp.int32), jnp.asarray(day, jnp.int32))

    def step(
        self, key: types.Key, state: SessionState, slate: chex.Array, params: Any
    ) -> tuple[Observation, SessionState, chex.Array, chex.Array, chex.Array, dict[str, chex.Array]]:
        """Show a slate to each user.

        Args:
          key: typed key; the same for all steps, or a new one.
          state: of `reset` or `step`.
          slate: [B, K] int32, positions among `obs.candidates`.
          params: as in `reset`.

        Returns:
          The next observation, the next state, reward [B] in seconds, terminated [B], truncated [B], and info.

        Raises:
          ValueError: for a raw key, or a slate of another shape or dtype.
        """
        check_key(key)
        slate, wanted = jnp.asarray(slate), (*state.terminated.shape, self.slate_size)
        if slate.shape != wanted or not jnp.issubdtype(slate.dtype, jnp.integer):
            raise ValueError(
                f"slate has shape {slate.shape} and dtype {slate.dtype}; give whole numbers [B, K] = {list(wanted)}, "
                "positions among obs.candidates"
            )
        return _step(self._static, key, state, slate.astype(jnp.int32), params)

    @property
    def _static(self) -> Any:
        """The environment without parameters, so that all of one kind share the programs of `reset` and `step`."""
        return self.replace(default_params=None)  # type: ignore[attr-defined]

    @functools.cached_property
    def _shapes(self) -> Observation:
        return jax.eval_shape(
            lambda params: self.reset(types.make_key(0), params, jnp.zeros(1, jnp.int32))[0], self.default_params
        )


@jax.jit
def _reset(
    env: Environment, key: types.Key, params: Any, user_ids: chex.Array, day: chex.Array
) -> tuple[Observation, SessionState]:
    request, history, hidden = env.reset_env(key, params, user_ids, day)
    over = jnp.zeros(user_ids.shape, bool)
    state = SessionState(hidden, request, history, nothing_shown(history, env.slate_size), over, over)
    return _observe(params.items, state), state


@jax.jit
def _step(
    env: Environment, key: types.Key, state: SessionState, slate: chex.Array, params: Any
) -> tuple[Observation, SessionState, chex.Array, chex.Array, chex.Array, dict[str, chex.Array]]:
    over = state.terminated | state.truncated
    shown, invalid = _valid(slate, state.request.candidates.shape[1])
    result, hidden = env.step_env(key, state.hidden, shown, params)
    exposure = result.exposure
    moved = SessionState(
        hidden=hidden,
        request=result.request,
        history=append(state.history, exposure),
        exposure=exposure,
        terminated=result.terminated,
        truncated=result.truncated,
    )
    state = where(over, state, moved)
    mask = exposure.mask & ~over[:, None]
    feedback = jnp.where(mask[..., None], exposure.feedback, 0.0)
    reward = feedback[..., env.signals.index(env.signals.main)].sum(axis=1)
    info = {"feedback": feedback, "mask": mask, "invalid": jnp.where(over, 0, invalid)}
    return _observe(params.items, state), state, reward, state.terminated, state.truncated, info


def where(chosen: chex.Array, there: Any, otherwise: Any) -> Any:
    """Select rows of trees with leaves [B, ...]: those of `there` where `chosen` [B] is True."""

    def select(a: chex.Array, b: chex.Array) -> chex.Array:
        return jnp.where(chosen.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(select, there, otherwise)


def observe(
    items: types.Items, request: types.Request, history: types.Exposure, exposure: types.Exposure
) -> Observation:
    """Return the observation of a request, given the last H exposures and the previous slate."""
    return Observation(
        user_id=request.user_id,
        profile=request.profile,
        context=request.context,
        candidates=request.candidates,
        features=items.features_of(request.candidates),
        history=history,
        exposure=exposure,
    )


def nothing_shown(history: types.Exposure, slate_size: int) -> types.Exposure:
    """Return slates [B, K] in which nothing was shown, of the dtypes of a history [B, H]."""

    def zeros(x: chex.Array) -> chex.Array:
        return jnp.zeros((x.shape[0], slate_size, *x.shape[2:]), x.dtype)

    return jax.tree.map(zeros, history)


def append(history: types.Exposure, exposure: types.Exposure) -> types.Exposure:
    """Return the last H exposures [B, H] after a slate [B, K]."""

    def join(old: chex.Array, new: chex.Array) -> chex.Array:
        return jnp.concatenate([old, new.astype(old.dtype)], axis=1)[:, -old.shape[1] :]

    return jax.tree.map(join, history, exposure)


def _observe(items: types.Items, state: SessionState) -> Observation:
    return observe(items, state.request, state.history, state.exposure)


def _valid(slate: chex.Array, num_candidates: int) -> tuple[chex.Array, chex.Array]:
    """Return slates [B, K] of distinct positions in range, and how many entries [B] had to be replaced."""
    k = slate.shape[1]
    spare = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), slate.shape)
    listed = jnp.concatenate([slate, spare], axis=1)
    earlier = jnp.tril(jnp.ones((2 * k, 2 * k), bool), -1)
    repeated = jnp.any((listed[:, :, None] == listed[:, None, :]) & earlier, axis=-1)
    usable = (listed >= 0) & (listed < num_candidates) & ~repeated
    first = jnp.argsort(~usable, axis=1, stable=True)[:, :k]
    return jnp.take_along_axis(listed, first, axis=1), jnp.sum(~usable[:, :k], axis=1, dtype=jnp.int32)


def check_key(key: Any) -> None:
    """Refuse a raw key, or several keys."""
    typed = jnp.issubdtype(getattr(key, "dtype", np.dtype(object)), jax.dtypes.prng_key)
    if typed and jax.random.key_impl(key) != "threefry2x32":
        raise ValueError(f"key is of impl {jax.random.key_impl(key)!r}; use jax.random.key(0, impl='threefry2x32')")
    if not typed or key.shape:
        raise ValueError(
            f"key is {getattr(key, 'dtype', type(key).__name__)} of shape {getattr(key, 'shape', ())}; give one typed "
            "key, such as jax.random.key(0), and vmap over several"
        )
