"""An environment behind Gymnasium's interfaces: one user at a time, or a vector of them. Needs gymnasium.

Observations are flat dictionaries of arrays: `profile`, `context`, `candidates`, `features`, and `videos`, `feedback`
and `mask` of `history` and of `exposure` (as in `history_videos`); see `envs.environment.Observation`.
"""

from __future__ import annotations

from typing import Any

import chex
import gymnasium
import jax
import numpy as np
from gymnasium.vector.utils import batch_space

from mmrf_jax import types
from mmrf_jax.envs import environment

_USERS = 2**31 - 1

Arrays = dict[str, np.ndarray]


class GymnasiumEnv(gymnasium.Env[Arrays, np.ndarray]):
    """Sessions of one user as a `gymnasium.Env`; each `reset` brings another user.

    Action: K positions among the candidates, `MultiDiscrete([C] * K)`. Repeated positions are replaced, see
    `envs.environment.Environment`. Reward: seconds of watch time. Info: `user_id`; after a step also `feedback` [K, S],
    `mask` [K] and `invalid`.

    Args:
      env: of `mmrf.make`.
      seed: of the first `reset`, if that is not given one.
      params: of the environment; None for `env.default_params`.

    Example:
      >>> import mmrf_jax as mmrf
      >>> env = mmrf.make("short-video", num_videos=3_000, num_candidates=20, slate_size=3)
      >>> gym_env = mmrf.wrappers.GymnasiumEnv(env, seed=0)
      >>> obs, info = gym_env.reset()
      >>> obs, reward, terminated, truncated, info = gym_env.step(gym_env.action_space.sample())
      >>> obs["features"].shape, info["feedback"].shape
      ((20, 24), (3, 9))
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as Gymnasium declares it

    def __init__(self, env: environment.Environment, seed: int = 0, params: Any = None):
        _check(env)
        self.env, self._params, self._first_seed = env, env.default_params if params is None else params, seed
        self.observation_space, self.action_space = _spaces(env)  # type: ignore[assignment]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Arrays, dict[str, Any]]:
        """Start a session; `options={"user_id": 7}` names its user, who is drawn otherwise."""
        if seed is None and self._np_random is None:
            seed = self._first_seed
        super().reset(seed=seed)
        user, key = (int(x) for x in self.np_random.integers(_USERS, size=2))
        user = (options or {}).get("user_id", user)
        self._key = types.make_key(key)
        obs, self._state = self.env.reset(self._key, self._params, np.array([user], np.int32))
        return _first(_arrays(obs)), {"user_id": user}

    def step(self, action: np.ndarray) -> tuple[Arrays, float, bool, bool, dict[str, Any]]:
        """Show a slate [K]; after the end of the session, until `reset`, this changes nothing."""
        slate = np.asarray(action)[None].astype(np.int32)
        obs, self._state, reward, terminated, truncated, info = self.env.step(
            self._key, self._state, slate, self._params
        )
        info = {"user_id": int(obs.user_id[0])} | _first({name: np.asarray(x) for name, x in info.items()})
        return _first(_arrays(obs)), float(reward[0]), bool(terminated[0]), bool(truncated[0]), info


class GymnasiumVectorEnv(gymnasium.vector.VectorEnv[Arrays, np.ndarray, np.ndarray]):
    """Sessions of `num_envs` users as a `gymnasium.vector.VectorEnv`, in one compiled program.

    Autoreset: `AutoresetMode.NEXT_STEP`. The step after the end of a session ignores its action, has reward 0 and
    returns the first observation of another user.

    Args:
      env: of `mmrf.make`.
      num_envs: users at a time.
      seed: of the first `reset`, if that is not given one.
      params: of the environment; None for `env.default_params`.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - as Gymnasium declares it
        "render_modes": [],
        "autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        env: environment.Environment,
        num_envs: int,
        seed: int = 0,
        params: Any = None,
    ):
        _check(env)
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}; use 1 or more")
        self.env, self.num_envs = env, num_envs
        self._params, self._first_seed = env.default_params if params is None else params, seed
        self.single_observation_space, self.single_action_space = _spaces(env)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._step = jax.jit(self._step_or_reset)

    def reset(  # type: ignore[override]  # Gymnasium also takes a list of seeds
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Arrays, dict[str, Any]]:
        """Start a session in each environment."""
        if seed is None and self._np_random is None:
            seed = self._first_seed
        super().reset(seed=seed)
        first, key = (int(x) for x in self.np_random.integers(_USERS, size=2))
        self._key = types.make_key(key)
        self._users, self._next_user = np.zeros(self.num_envs, np.int32), first
        self._replace_users(np.ones(self.num_envs, bool))
        obs, self._state = self.env.reset(self._key, self._params, self._users)
        return _arrays(obs), {"user_id": self._users.copy()}

    def step(self, actions: np.ndarray) -> tuple[Arrays, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Show slates [num_envs, K]; environments whose session is over start the next one."""
        slates = np.asarray(actions).astype(np.int32)
        over = np.asarray(self._state.terminated | self._state.truncated)
        self._replace_users(over)
        obs, self._state, reward, info = self._step(self._key, self._state, slates, self._users, self._params)
        terminated, truncated = np.array(self._state.terminated), np.array(self._state.truncated)
        infos = {"user_id": self._users.copy(), **{name: np.asarray(x) for name, x in info.items()}}
        return _arrays(obs), np.asarray(reward, np.float64), terminated, truncated, infos

    def _replace_users(self, where: np.ndarray) -> None:
        number = int(where.sum())
        self._users[where] = (self._next_user + np.arange(number)) % _USERS
        self._next_user += number

    def _step_or_reset(
        self,
        key: types.Key,
        state: environment.SessionState,
        slates: chex.Array,
        users: chex.Array,
        params: Any,
    ) -> tuple[environment.Observation, environment.SessionState, chex.Array, dict[str, chex.Array]]:
        over = state.terminated | state.truncated
        obs, state, reward, _, _, info = self.env.step(key, state, slates, params)

        def renewed() -> tuple[environment.Observation, environment.SessionState]:
            return environment.where(over, self.env.reset(key, params, users), (obs, state))

        obs, state = jax.lax.cond(over.any(), renewed, lambda: (obs, state))
        return obs, state, reward, info


def _check(env: Any) -> None:
    if not isinstance(env, environment.Environment):
        raise ValueError(f"env is of type {type(env).__name__}; give an environment of mmrf_jax.make")


def _spaces(env: environment.Environment) -> tuple[gymnasium.spaces.Dict, gymnasium.spaces.MultiDiscrete]:
    def space(spec: environment.ArraySpec) -> gymnasium.Space:
        if spec.dtype == bool:
            return gymnasium.spaces.MultiBinary(spec.shape)
        low, high = (np.broadcast_to(np.asarray(x, spec.dtype), spec.shape) for x in (spec.low, spec.high))
        return gymnasium.spaces.Box(low, high, spec.shape, spec.dtype.type)

    spaces = {name: space(spec) for name, spec in _named(env.observation_spec).items()}
    slates = gymnasium.spaces.MultiDiscrete([env.num_candidates] * env.slate_size)
    return gymnasium.spaces.Dict(spaces), slates


def _named(obs: environment.Observation) -> dict[str, Any]:
    """Return the parts of an observation or of its spec; the user id is none, it goes to `info`."""
    parts = {name: getattr(obs, name) for name in ("profile", "context", "candidates", "features")}
    for name in ("history", "exposure"):
        exposure = getattr(obs, name)
        parts |= {f"{name}_{part}": getattr(exposure, part) for part in ("videos", "feedback", "mask")}
    return parts


def _arrays(obs: environment.Observation) -> Arrays:
    def array(x: chex.Array) -> np.ndarray:
        x = np.asarray(x)
        return x.astype(np.int8) if x.dtype == bool else x

    return {name: array(x) for name, x in _named(obs).items()}


def _first(arrays: Arrays) -> Arrays:
    return {name: x[0] for name, x in arrays.items()}
