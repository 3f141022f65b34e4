"""Session logs of a policy in an environment that stay on the devices: each serves its share of the users.

`envs.collect` is the same for logs in host memory. Between two calls the host reads a few sums, not the log.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax import types
from mmrf_jax.data import device_log
from mmrf_jax.data.device_log import DeviceLog, Layout, Rows
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.envs import collect, rollout
from mmrf_jax.envs.environment import Environment
from mmrf_jax.envs.rankers import AnyRanker
from mmrf_jax.parallel import multihost, programs
from mmrf_jax.parallel.partitioner import Partitioner

_STEPS = 16  # requests per slot between two looks at the sums
_BLOCK = _STEPS  # rows per float32 sum; the host adds these in float64
_POSITIONS = 4096  # of a session, as random numbers are drawn for


class _Served(NamedTuple):
    """What a device has served so far; arrays have one row per user of the device."""

    slots: rollout.EnvState
    sessions: chex.Array  # [users, ·] as `Rows.sessions`
    length: chex.Array  # [users] int32, requests of sessions that have ended
    terminated: chex.Array  # [users] bool


class _Chunk(NamedTuple):
    """Requests of `_STEPS` steps of all slots, in any order, [steps × slots, …]."""

    requests: chex.Array
    exposures: chex.Array
    user: chex.Array  # int32, row of the device's users; past the last one for an idle slot
    position: chex.Array  # int32, in the session
    sums: chex.Array  # [steps × slots / _BLOCK, 2 + 3 S] requests, exposures, sums of feedback, its squares and returns


def collect_on_devices(
    env: Environment,
    policy: AnyRanker,
    key: types.Key,
    partitioner: Partitioner,
    spec: InputSpec,
    *,
    first_user: int,
    num_sessions: int,
    day: int,
    discount: float,
    slots: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> DeviceLog:
    """Collect the sessions of users `first_user … first_user + num_sessions - 1` on a day, in order of user id.

    Args:
      env: environment.
      policy: ranker; its log-probabilities are logged as propensities.
      key: of the log.
      partitioner: the devices; every process calls this with the same arguments.
      spec: of the log.
      discount: of the returns in `DeviceLog.feedback_statistics`.
      slots: users in flight on each device; None for `collect.slots_for` its share.
      progress: called with the number of sessions that have ended so far.
    """
    collect.check_users(first_user, num_sessions)
    devices = partitioner.num_devices
    each = -(-num_sessions // devices)
    size = collect.slots_for(each) if slots is None else min(slots, each)
    queue = np.clip(num_sessions - each * np.arange(devices), 0, each).astype(np.int32)
    users = (first_user + each * np.arange(devices)).astype(np.int32)
    mine = partitioner.shard_inputs(tuple(partitioner.local_rows(x) for x in (users, queue)))
    env, policy, key = partitioner.replicate((env, policy, key))
    layout, sums, chunks = Layout.of(spec), np.zeros(2 + 3 * len(spec.signals)), []
    constant = partitioner.replicate(np.int32(day))
    weights = partitioner.replicate(_return_weights(discount))
    sizes = {"share": each, "slots": size, "width": layout.bytes_per_session // 4}
    served = _begin(env, policy, key, constant, *mine, **sizes, partitioner=partitioner)
    while True:
        served, chunk, ended = _unroll(env, policy, key, constant, weights, served, partitioner=partitioner)
        chunks.append(chunk)
        sums += multihost.fetch(chunk.sums).sum(axis=0, dtype=np.float64)
        done = int(multihost.fetch(ended).sum())
        progress(done)
        if done >= num_sessions:
            break
    return _assembled(layout, served, chunks, sums, num_sessions, partitioner)


def _return_weights(discount: float) -> np.ndarray:
    """Return by how much a reward at each position counts in the sum of its session's returns: 1 + γ + … + γ^t."""
    return np.cumsum(float(discount) ** np.arange(_POSITIONS)).astype(np.float32)


@programs.program(calls="few", static_argnames=("share", "slots", "width", "partitioner"))
def _begin(env, policy, key, day, users, queue, *, share, slots, width, partitioner):
    """Create idle slots on each device, with its queue of users."""

    def one_device(env, policy, key, day, users, queue):
        state = rollout.idle(env, policy, key, users[0], queue[0], day, slots, keep_history=True)
        sessions, length = jnp.zeros((share, width), jnp.uint32), jnp.zeros((share,), jnp.int32)
        return _with_axis(_Served(state, sessions, length, jnp.zeros((share,), bool)))

    return partitioner.shard_users(one_device, num_replicated=4)(env, policy, key, day, users, queue)


@programs.program(calls="many", static_argnames="partitioner", donate_argnames="served")
def _unroll(env, policy, key, day, weights, served, *, partitioner):
    """Serve `_STEPS` requests of every slot; also return the number of ended sessions [devices]."""

    def one_device(env, policy, key, day, weights, served):
        def step(served, _):
            return _step(env, policy, key, day, served)

        served, made = jax.lax.scan(step, _without_axis(served), length=_STEPS)
        requests, exposures, user, position, shown, feedback = (x.reshape(-1, *x.shape[2:]) for x in made)
        sums = _sums(shown, feedback, user < served.slots.num_users, weights[position])
        ended = served.slots.started - jnp.sum(served.slots.index < served.slots.num_users, dtype=jnp.int32)
        return _with_axis(served), _Chunk(requests, exposures, user, position, sums), ended[None]

    return partitioner.shard_users(one_device, num_replicated=5)(env, policy, key, day, weights, served)


def _step(env, policy, key, day, served: _Served):
    """Serve one request of every slot; the histories of sessions that begin go to their users' rows."""
    slots = rollout.refill(env, policy, key, day, served.slots)
    assert slots.history is not None
    date = jnp.broadcast_to(day, slots.index.shape)
    here = device_log.pack_sessions(slots.request.user_id, date, slots.request.profile, slots.history)
    users = served.length.shape[0]
    begun = jnp.where((slots.index < slots.num_users) & (slots.position == 0), slots.index, users)
    sessions = served.sessions.at[begun].set(here, mode="drop")
    slots, record, _, _ = rollout.step_slots(env, policy, key, day, slots)
    over = record.live & (record.terminated | record.truncated)
    at = jnp.where(over, record.index, users)
    served = _Served(
        slots,
        sessions,
        served.length.at[at].set(record.position + 1, mode="drop"),
        served.terminated.at[at].set(record.terminated, mode="drop"),
    )
    request = record.request
    requests = device_log.pack_requests(request.context, request.candidates, record.slate, record.log_propensity)
    exposures = device_log.pack_exposures(request.candidates, record.slate, record.feedback)
    return served, (requests, exposures, record.index, record.position, record.slate >= 0, record.feedback)


def _sums(shown, feedback, live, weight) -> chex.Array:
    """Sum rows [n, …] in blocks: requests, exposures, feedback [S], its squares [S] and the returns' shares [S]."""
    shown = (shown & live[:, None]).astype(jnp.float32)
    liked = jnp.where(shown[..., None] > 0, feedback, 0.0)
    total, squares = liked.sum(axis=1), (liked**2).sum(axis=1)
    counts = jnp.stack([live.astype(jnp.float32), shown.sum(axis=1)], axis=-1)
    rows = jnp.concatenate([counts, total, squares, weight[:, None] * total], axis=-1)
    return rows.reshape(-1, _BLOCK, rows.shape[-1]).sum(axis=1)


def _with_axis(served: _Served) -> _Served:
    """Give the numbers of a device an axis, along which those of all devices are joined."""
    return _of_numbers(served, lambda x: x[None])


def _without_axis(served: _Served) -> _Served:
    return _of_numbers(served, lambda x: x[0])


def _of_numbers(served: _Served, change: Callable[[chex.Array], chex.Array]) -> _Served:
    slots = served.slots
    numbers = {name: change(getattr(slots, name)) for name in ("started", "num_users", "users")}
    return served._replace(slots=dataclasses.replace(slots, **numbers))


def _assembled(
    layout: Layout, served: _Served, chunks: list[_Chunk], sums: np.ndarray, num_sessions: int, partitioner
) -> DeviceLog:
    """Put the requests of all chunks in order, on the devices; the chunks are freed one by one."""
    devices = partitioner.num_devices
    length = multihost.fetch(served.length).reshape(devices, -1).astype(np.int64)
    terminated = multihost.fetch(served.terminated)
    before = np.cumsum(length, axis=1) - length  # requests of the device's earlier users
    rows = device_log.padded_size(max(int(length.sum(axis=1).max()), 1))
    place = partitioner.shard_inputs(partitioner.local_rows(before.reshape(-1).astype(np.int32)))
    widths = (chunks[0].requests.shape[1], chunks[0].exposures.shape[1])
    whole = _empty(rows=rows * devices, widths=widths, partitioner=partitioner)
    while chunks:
        whole = _put(whole, chunks.pop(0), place, partitioner=partitioner)
    first = (before + rows * np.arange(devices)[:, None]).reshape(-1)[:num_sessions]
    requests, exposures, *rest = np.split(sums, [1, 2, 2 + layout.signals, 2 + 2 * layout.signals])
    mean = rest[0] / exposures
    std = np.sqrt(np.maximum(rest[1] / exposures - mean**2, 0.0))
    return DeviceLog(
        layout,
        Rows(served.sessions, *whole),
        first,
        length.reshape(-1)[:num_sessions],
        terminated[:num_sessions],
        ~terminated[:num_sessions],
        (mean, std, rest[2] / requests),
    )


def _empty(*, rows: int, widths: tuple[int, int], partitioner: Partitioner) -> tuple[jax.Array, jax.Array]:
    def zeros():
        return tuple(jnp.zeros((rows, width), jnp.uint32) for width in widths)

    return jax.jit(zeros, out_shardings=partitioner.data_sharding)()


@programs.program(calls="few", static_argnames="partitioner", donate_argnums=0)
def _put(whole, chunk: _Chunk, place, *, partitioner: Partitioner):
    """Write a chunk's requests to their places: the users of a device in order, each one's requests in order."""

    def one_device(whole, requests, exposures, user, position, place):
        where = jnp.where(user < place.shape[0], place[jnp.minimum(user, place.shape[0] - 1)] + position, len(whole[0]))
        return tuple(x.at[where].set(y, mode="drop") for x, y in zip(whole, (requests, exposures), strict=True))

    run = partitioner.shard_users(one_device, num_replicated=0)
    return run(whole, chunk.requests, chunk.exposures, chunk.user, chunk.position, place)
