"""Session logs of a policy in an environment: unrolled on the device, put in order on the host."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from mmrf_jax import types
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.envs import rollout
from mmrf_jax.envs.environment import Environment
from mmrf_jax.envs.rankers import AnyRanker
from mmrf_jax.parallel.partitioner import Partitioner

_UNROLL = 16  # requests per slot between two transfers to the host
_SLOTS = 1024


def slots_for(num_sessions: int) -> int:
    """Return the number of users in flight: few enough that most slots are busy while the last sessions end."""
    return int(np.clip(num_sessions // 4, 16, _SLOTS))


def check_users(first_user: int, number: int) -> None:
    """Refuse users whose ids do not fit int32.

    Raises:
      ValueError: naming them.
    """
    if first_user < 0 or first_user + number > 2**31 - 1:
        raise ValueError(
            f"users {first_user} … {first_user + number - 1} are not all in [0, 2^31 - 1); lower first_user"
        )


def collect(
    env: Environment,
    policy: AnyRanker,
    key: types.Key,
    *,
    first_user: int,
    num_sessions: int,
    day: int,
    slots: int | None = None,
    keep_scores: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Sessions:
    """Collect the sessions of users `first_user … first_user + num_sessions - 1` on a day, in order of user id.

    Args:
      env: environment.
      policy: ranker; its log-probabilities are logged as propensities.
      slots: users in flight at a time, a compile-time size; None for `slots_for(num_sessions)`.
      keep_scores: whether to log the policy's scores [r, C].
      progress: called with the number of sessions that have ended so far.
    """
    check_users(first_user, num_sessions)
    size = slots_for(num_sessions) if slots is None else slots
    # Use one device from the first call on: a program is compiled for the placement of its arrays.
    here = Partitioner(jax.local_devices()[:1])
    env, policy, key = here.replicate((env, policy, key))
    state = rollout.reset_slots(env, policy, key, first_user, num_sessions, day, slots=size)
    state = here.replicate(state)
    requests: list[dict[str, np.ndarray]] = []
    sessions: list[dict[str, np.ndarray]] = []
    while True:
        state, record = rollout.unroll(env, policy, key, day, state, num_steps=_UNROLL)
        host = jax.tree.map(np.asarray, jax.device_get(record))
        live = host.live
        requests.append(
            {
                "index": host.index[live],
                "position": host.position[live],
                "context": host.request.context[live],
                "candidates": host.request.candidates[live],
                "slate": host.slate[live],
                "feedback": host.feedback[live],
                "log_propensity": host.log_propensity[live],
                "over": (host.terminated | host.truncated)[live],
                "terminated": host.terminated[live],
            }
            | ({"scores": host.scores[live]} if keep_scores else {})
        )
        first = live & (host.position == 0)
        sessions.append(
            {
                "index": host.index[first],
                "user_id": host.request.user_id[first],
                "profile": host.request.profile[first],
                "history_videos": host.history.videos[first],
                "history_feedback": host.history.feedback[first],
                "history_mask": host.history.mask[first],
            }
        )
        ended = int(state.started) - int(np.sum(np.asarray(state.index) < num_sessions))
        progress(ended)
        if ended >= num_sessions:
            break
    return _assemble(requests, sessions, day)


def _assemble(requests, sessions, day: int) -> Sessions:
    r = {name: np.concatenate([x[name] for x in requests]) for name in requests[0]}
    s = {name: np.concatenate([x[name] for x in sessions]) for name in sessions[0]}
    order = np.lexsort((r["position"], r["index"]))
    r = {name: x[order] for name, x in r.items()}
    order = np.argsort(s["index"], kind="stable")
    s = {name: x[order] for name, x in s.items()}
    num = len(s["index"])
    terminated = np.zeros(num, bool)
    terminated[r["index"][r["over"]]] = r["terminated"][r["over"]]
    return Sessions(
        user_id=s["user_id"],
        date=np.full(num, day, np.int32),
        profile=s["profile"],
        history_videos=s["history_videos"],
        history_feedback=s["history_feedback"],
        history_mask=s["history_mask"],
        terminated=terminated,
        truncated=~terminated,
        offsets=np.searchsorted(r["index"], np.arange(num + 1)).astype(np.int64),
        context=r["context"],
        candidates=r["candidates"],
        slate=r["slate"].astype(np.int32),
        feedback=r["feedback"],
        log_propensity=r["log_propensity"],
        scores=r.get("scores"),
    )
