"""Jitted loops of a policy in an environment: per-user sums over very large batches, and unrolls that become logs.

A slot whose session ended is refilled with the next user id. So the work per live request is the same for a thousand
users and for a million, and memory grows with the users only by their sums. The outcome for a user depends on the key
and the user id alone, never on the slot.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from mmrf_jax import ops, random, types
from mmrf_jax.envs.environment import Environment
from mmrf_jax.envs.rankers import AnyRanker
from mmrf_jax.metrics import diversity
from mmrf_jax.parallel import programs
from mmrf_jax.signals import Signals

EXPOSURE_GROUPS = 20  # user groups with separate exposure counts, for the intervals of coverage and Gini


def user_metrics(signals: Signals) -> tuple[str, ...]:
    """Return the columns of the per-user sums.

    Interactions are counts; `returned` is 1 if the user returns within a day, `next_visit` the number of days until
    then.
    """
    counted = ("depth", "requests", *signals.binary_names)
    return (*signals.numeric_names, *counted, "ild", "returned", "truncated", "next_visit")


@struct.dataclass
class EnvState:
    """B users in their sessions, and the queue of users who have not started."""

    state: Any  # of the environment, hidden
    request: types.Request
    carry: Any  # of the policy
    history: types.Exposure | None  # [B, H], history at arrival, for logs
    position: chex.Array  # [B] int32, requests of the session so far
    index: chex.Array  # [B] int32, the user's position in the queue; `num_users` if the slot is idle
    started: chex.Array  # int32, users taken from the queue
    num_users: chex.Array  # int32, length of the queue
    users: chex.Array  # int32, its first user id, or [num_users] all of them


@struct.dataclass
class Transition:
    """One step of all slots, as logged; `live` marks the slots that held a session."""

    live: chex.Array  # [B] bool
    index: chex.Array  # [B] int32
    position: chex.Array  # [B] int32, requests of the session before this one
    request: types.Request
    history: types.Exposure | None
    scores: chex.Array  # [B, C]
    slate: chex.Array  # [B, K], -1 where fewer were shown
    log_propensity: chex.Array  # [B], of the whole slate
    feedback: chex.Array  # [B, K, S]
    terminated: chex.Array  # [B] bool
    truncated: chex.Array  # [B] bool


def exposure_group(user_ids: chex.Array) -> chex.Array:
    """Return groups [B] in [0, EXPOSURE_GROUPS) of users [B], by a multiplicative hash: independent of the queue."""
    return (user_ids.astype(jnp.uint32) * jnp.uint32(2654435769) >> 16).astype(jnp.int32) % EXPOSURE_GROUPS


def _ids(users: chex.Array, number: chex.Array) -> chex.Array:
    """Return the ids [B] of users by their position in the queue; past its end, the ids are arbitrary."""
    return users.at[number].get(mode="clip") if users.ndim else users + number


def select_slate(
    policy: AnyRanker, env_params, state, carry, request: types.Request, user, position, key: types.Key, k: int
):
    """Score candidates [B, C], select slates [B, K] and compute their log-probabilities [B] (0 if deterministic).

    Args:
      user: [B] int32, ids in the queue, which seed the randomness; requests of a learned environment have logged ids.
    """
    scores = policy.scores(env_params, state, carry, request)
    temperature = jnp.asarray(policy.temperature, jnp.float32)
    stochastic = temperature > 0.0
    scaled = scores / jnp.where(stochastic, temperature, 1.0)

    def perturbed() -> chex.Array:
        u = random.per_user_uniform(jax.random.fold_in(key, 4), position, user, scores.shape[-1])
        return scaled + random.to_gumbel(u)

    slate = ops.top_k(jax.lax.cond(stochastic, perturbed, lambda: scaled), k)
    log_prob = jax.lax.cond(
        stochastic,
        lambda: ops.plackett_luce_log_prob(scaled, slate).sum(axis=-1),
        lambda: jnp.zeros(scores.shape[:1], jnp.float32),
    )
    return scores, slate, log_prob


def idle(
    env: Environment, policy: AnyRanker, key: types.Key, users, num_users, day, slots: int, keep_history: bool
) -> EnvState:
    """Create slots without users; `refill` gives them the first users of the queue.

    Args:
      users: int32, first id of the queue `users … users + num_users - 1`; or an array of all ids, at least `num_users`.
      keep_history: if False, histories enter only the policy's first carry; no histories are drawn for a policy that
        ignores them.
    """

    def first_users():
        request, history, state = env.reset_env(key, env.default_params, jnp.zeros((slots,), jnp.int32), day)
        return state, request, policy.initial_carry(request, history), history if keep_history else None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(first_users))
    state, request, carry, history = zeros
    users, num_users = jnp.asarray(users, jnp.int32), jnp.asarray(num_users, jnp.int32)
    return EnvState(
        state=state,
        request=request,
        carry=carry,
        history=history,
        position=jnp.zeros((slots,), jnp.int32),
        index=jnp.full((slots,), num_users),
        started=jnp.zeros((), jnp.int32),
        num_users=num_users,
        users=users,
    )


def step_slots(env: Environment, policy: AnyRanker, key: types.Key, day, slots: EnvState):
    """Serve one request of every live slot.

    Returns:
      The slots, a Transition, the Exposure and, where a session ended, the days [B] until the next visit, else 0.
    """
    live = slots.index < slots.num_users
    scores, slate, log_propensity = select_slate(
        policy,
        env.default_params,
        slots.state,
        slots.carry,
        slots.request,
        _ids(slots.users, slots.index),
        day * 4096 + slots.position,
        key,
        env.slate_size,
    )
    result, state = env.step_env(key, slots.state, slate, env.default_params)
    days = env.next_visit(key, state, env.default_params)
    record = Transition(
        live=live,
        index=slots.index,
        position=slots.position,
        request=slots.request,
        history=slots.history,
        scores=scores,
        slate=jnp.where(result.exposure.mask, slate, -1),
        log_propensity=jnp.where(result.exposure.mask.all(axis=1), log_propensity, jnp.nan),
        feedback=result.exposure.feedback,
        terminated=result.terminated,
        truncated=result.truncated,
    )
    over = result.terminated | result.truncated
    slots = dataclasses.replace(
        slots,
        state=state,
        request=result.request,
        carry=policy.next_carry(slots.carry, slots.request, result.exposure),
        position=slots.position + 1,
        index=jnp.where(over, slots.num_users, slots.index),
    )
    return slots, record, result.exposure, jnp.where(over, days, 0)


def refill(env: Environment, policy: AnyRanker, key: types.Key, day, slots: EnvState) -> EnvState:
    """Assign waiting users to idle slots, a fixed number at a time, so that no reset is wasted."""
    num_slots = slots.index.shape[0]
    chunk = max(1, num_slots // 8)

    def due(slots):
        waiting = slots.num_users - slots.started
        idle = jnp.sum(slots.index >= slots.num_users, dtype=jnp.int32)
        return (waiting > 0) & (idle >= jnp.minimum(chunk, waiting))

    def fill(slots):
        where = jnp.nonzero(slots.index >= slots.num_users, size=chunk, fill_value=num_slots)[0].astype(jnp.int32)
        number = slots.started + jnp.arange(chunk, dtype=jnp.int32)
        where = jnp.where(number < slots.num_users, where, num_slots)
        request, history, state = env.reset_env(key, env.default_params, _ids(slots.users, number), day)
        carry = policy.initial_carry(request, history)
        old = (slots.state, slots.request, slots.carry, slots.history, slots.position, slots.index)
        kept = None if slots.history is None else history
        new = (state, request, carry, kept, jnp.zeros_like(number), number)

        def put(a, b):
            return a.at[where].set(b, mode="drop")

        state, request, carry, history, position, index = jax.tree.map(put, old, new)
        return dataclasses.replace(
            slots,
            state=state,
            request=request,
            carry=carry,
            history=history,
            position=position,
            index=index,
            started=jnp.minimum(slots.started + chunk, slots.num_users),
        )

    return jax.lax.while_loop(due, fill, slots)


def rollout(
    env: Environment,
    policy: AnyRanker,
    key: types.Key,
    users: chex.Array,
    day: chex.Array,
    *,
    num_users: int,
    slots: int,
    queue: chex.Array | None = None,
) -> tuple[chex.Array, chex.Array]:
    """Simulate a whole session for every user of a queue.

    Args:
      env: environment.
      policy: ranker.
      key: typed key of the rollout; the same key pairs the users of two policies.
      users: int32, first id of the queue `users … users + num_users - 1`; or [num_users] distinct ids in any order.
      day: int32, simulated day.
      num_users: rows of the result.
      slots: users in flight at a time.
      queue: int32, length of the queue if it is shorter than num_users; the rows past it are 0.

    Returns:
      Sums per user [num_users, M] float32 (`user_metrics`), and exposure counts [EXPOSURE_GROUPS, V] int32 per group.
    """
    signals = env.signals
    columns = len(user_metrics(signals))
    sums = jnp.zeros((num_users, columns), jnp.float32)
    counts = jnp.zeros((EXPOSURE_GROUPS, env.items.num_videos), jnp.int32)
    state = idle(env, policy, key, users, num_users if queue is None else queue, day, slots, keep_history=False)

    def unfinished(carry):
        state = carry[0]
        return (state.started < state.num_users) | jnp.any(state.index < state.num_users)

    def body(carry):
        state, sums, counts = carry
        state = refill(env, policy, key, day, state)
        state, record, shown, days = step_slots(env, policy, key, day, state)
        seen = record.feedback.sum(axis=1)  # [B, S]
        ones = jnp.ones(seen.shape[0], jnp.float32)
        ild = diversity.intra_list_diversity(env.items.tag[shown.videos], shown.mask)
        columns_of_row = [*(seen[:, i] for i in signals.numeric), shown.mask.sum(axis=1), ones]
        columns_of_row += [*(seen[:, i] for i in signals.binary), ild, days == 1, record.truncated, days]
        row = jnp.stack([column.astype(jnp.float32) for column in columns_of_row], axis=-1)
        index = jnp.where(record.live, record.index, num_users)
        sums = sums.at[index].add(row, mode="drop")
        group = jnp.where(record.live, exposure_group(_ids(state.users, record.index)), EXPOSURE_GROUPS)
        videos = jnp.where(shown.mask, shown.videos, counts.shape[1])
        counts = counts.at[group[:, None], videos].add(1, mode="drop")
        return state, sums, counts

    _, sums, counts = jax.lax.while_loop(unfinished, body, (state, sums, counts))
    return sums, counts


@functools.partial(jax.jit, static_argnames="slots")
def reset_slots(
    env: Environment, policy: AnyRanker, key: types.Key, first_user, num_users, day, *, slots: int
) -> EnvState:
    """Create idle slots with the queue `first_user … first_user + num_users - 1`, for `unroll`."""
    return idle(env, policy, key, first_user, num_users, day, slots, keep_history=True)


@programs.program(calls="many", static_argnames="num_steps", donate_argnames="slots")
def unroll(env: Environment, policy: AnyRanker, key: types.Key, day, slots: EnvState, *, num_steps: int):
    """Run `num_steps` steps of all slots (donated) and return them with a Transition of leading axis [num_steps]."""

    def body(slots, _):
        slots = refill(env, policy, key, day, slots)
        slots, record, _, _ = step_slots(env, policy, key, day, slots)
        return slots, record

    return jax.lax.scan(body, slots, length=num_steps)
