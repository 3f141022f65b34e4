"""A/B tests in an environment: policies serve simulated users, who are sharded over the devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax import types
from mmrf_jax.abtest import assignment, sequential, statistics
from mmrf_jax.envs import rankers, rollout
from mmrf_jax.envs.environment import Environment
from mmrf_jax.parallel import multihost, programs
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.signals import Signals

BLOCK = 50_000  # users per device and call: gives progress, and the last sessions of a call cost little
NOT_TESTED = ("truncated", "next_visit")  # columns of the sums that belong to no metric
_SLOTS = 256  # on CPUs: the data that a step gathers stays in cache
_MANY_SLOTS = 8_192  # on accelerators: steps large enough to hide launch overhead
_ANALYSES = 20  # interim analyses of a test with always-valid intervals


@dataclasses.dataclass(frozen=True)
class Design:
    """The design of an A/B test.

    Attributes:
      control: the arm that the others are compared with.
      num_users: per arm; the average number if users are assigned by hash.
      salt: None for a paired test, with the same users and the same random numbers in every arm. Otherwise each user is
        in one arm, by a hash of the id and this experiment name.
      cuped: whether to adjust for the users' histories (CUPED); for arms assigned by hash.
      always_valid: whether to give always-valid intervals too: of a test of one day for 20 interim analyses as users
        arrive, of a longer one for all days simultaneously.
    """

    control: str
    num_users: int
    salt: str | None = None
    cuped: bool = False
    always_valid: bool = False

    @property
    def paired(self) -> bool:
        """Whether every arm has the same users."""
        return self.salt is None

    def total(self, arms: int) -> int:
        """Return the number of users of a test of so many arms."""
        return self.num_users if self.paired else self.num_users * arms


@programs.program(calls="many", static_argnames=("num_users", "slots", "partitioner"))
def _serve(env: Environment, policy, key, users, queues, day, *, num_users, slots, partitioner):
    def one_device(env, policy, key, day, users, queue):
        sums, counts = rollout.rollout(env, policy, key, users, day, num_users=num_users, slots=slots, queue=queue[0])
        return sums, counts[None]

    run = partitioner.shard_users(one_device, num_replicated=4)
    return run(env, policy, key, day, users, queues)


def rollout_user_metrics(
    env: Environment,
    policy: rankers.AnyRanker,
    key: types.Key,
    partitioner: Partitioner,
    *,
    user_ids: np.ndarray,
    day: int,
    capacity: int | None = None,
) -> dict[str, np.ndarray]:
    """Serve one session to each user; return sums [n] by name of `rollout.user_metrics`.

    The result also has `user_id` [n] and `exposures` [G, V].

    Every device serves equally many users. A user's behaviour depends only on the key, the day and the user id.

    Args:
      user_ids: [n] distinct integers.
      day: simulated day.
      capacity: compiled size, at least n; calls with the same capacity share a program.
    """
    devices, num_users = partitioner.num_devices, len(user_ids)
    args, sizes = _call(env, policy, key, partitioner, user_ids, day, capacity)
    share, each = sizes["num_users"], -(-num_users // devices)
    sums, counts = _serve(*args, **sizes)
    names = rollout.user_metrics(env.signals)
    width = len(names)  # explicit: reshape cannot infer -1 for an empty array
    table = multihost.fetch(sums).astype(np.float64).reshape(devices, share, width)[:, :each]
    table = table.reshape(devices * each, width)[:num_users]
    result: dict[str, np.ndarray] = {name: table[:, i] for i, name in enumerate(names)}
    result["user_id"] = np.asarray(user_ids)
    result["exposures"] = functools.reduce(np.add, multihost.fetch(counts))  # of one device: no copy
    return result


def lower(env: Environment, policy, key: types.Key, partitioner: Partitioner, *, capacity: int):
    """Lower the program of `rollout_user_metrics` for these arguments, to compile it ahead of time."""
    args, sizes = _call(env, policy, key, partitioner, np.arange(1), 0, capacity)
    return _serve.lower(*args, **sizes)


def _call(env, policy, key, partitioner: Partitioner, user_ids: np.ndarray, day: int, capacity: int | None):
    """Return the arguments of `_serve`: the arrays, and the static sizes."""
    devices, num_users = partitioner.num_devices, len(user_ids)
    share = -(-max(capacity or 0, num_users, 1) // devices)
    users, each = np.zeros((devices, share), np.int32), -(-num_users // devices)
    queue = np.clip(num_users - each * np.arange(devices), 0, each).astype(np.int32)
    users[np.arange(share) < queue[:, None]] = user_ids
    most = _SLOTS if jax.default_backend() == "cpu" else _MANY_SLOTS
    here = partitioner.shard_inputs((partitioner.local_rows(users).reshape(-1), partitioner.local_rows(queue)))
    args = (*partitioner.replicate((env, policy, key)), *here, np.int32(day))
    return args, {"num_users": share, "slots": int(np.clip(share // 8, 16, most)), "partitioner": partitioner}


def block_users(total: int, partitioner: Partitioner) -> int:
    """Return the number of users that all devices serve in one call, in a test of `total` users."""
    return min(BLOCK * partitioner.num_devices, total)


@jax.jit
def _history_means(env: Environment, key, users, day):
    _, history, _ = env.reset_env(key, env.default_params, users, day)
    shown = history.mask[..., None].astype(jnp.float32)
    return (history.feedback * shown).sum(axis=1) / jnp.maximum(shown.sum(axis=1), 1.0)


def history_means(env: Environment, key: types.Key, user_ids: np.ndarray, day: int, block: int) -> np.ndarray:
    """Return mean feedback [n, S] over each user's initial history: a pre-experiment covariate, equal in all arms.

    Args:
      user_ids: [n].
      day: of the arrival.
      block: users per call.
    """
    number = len(env.signals)
    padded = np.zeros(-(-len(user_ids) // block) * block, np.int32)
    padded[: len(user_ids)] = user_ids
    parts = [_history_means(env, key, part, jnp.int32(day)) for part in padded.reshape(-1, block)]
    return np.concatenate([np.zeros((0, number)), *parts])[: len(user_ids)]


def users_of(names: list[str], user_ids: np.ndarray, salt: str | None) -> dict[str, np.ndarray]:
    """Return the users of each arm, {arm: ids}: split equally by hash, or all users in every arm if `salt` is None."""
    if salt is None:
        return dict.fromkeys(names, user_ids)
    arm = assignment.assign(user_ids, [1.0 / len(names)] * len(names), salt)
    return {name: user_ids[arm == i] for i, name in enumerate(names)}


def assign(names: list[str], design: Design) -> dict[str, np.ndarray]:
    """Return the users of each arm of a whole test, {arm: ids}.

    Raises:
      ValueError: for the first arm with fewer than two users, too few for an interval.
    """
    users = users_of(names, np.arange(design.total(len(names))), design.salt)
    for name, ids in users.items():
        if len(ids) < 2:
            raise ValueError(f"arm {name!r} has {len(ids)} users, and needs at least 2; use more sessions")
    return users


def conclude(
    test: statistics.ABTest,
    signals: Signals,
    quantile: float | None,
    truncated: Mapping[str, float],
    sessions: Mapping[str, float],
) -> dict[str, Any]:
    """Return the results of a test, of whose `sessions` (by arm) so many were `truncated`; see `simulate_ab_test`."""
    shares = {name: 100.0 * number / max(sessions[name], 1) for name, number in truncated.items()}
    result = test.results(quantile) | {"truncated_pct": shares, "signals": signals.as_dict()}
    if test.paired:
        return result
    users = test.users()
    p = assignment.sample_ratio_mismatch(list(users.values()), [1.0] * len(users)) if len(users) > 1 else 1.0
    return result | {"sample_ratio_mismatch": {"users": users, "p_value": p}}


def simulate_ab_test(
    env: Environment,
    arms: Mapping[str, rankers.AnyRanker],
    key: types.Key,
    partitioner: Partitioner,
    design: Design,
    *,
    day: int,
    progress: Callable[[int], None] = lambda done: None,
    observe: Callable[[Mapping[str, Mapping[str, np.ndarray]]], object] = lambda sums: None,
) -> dict:
    """Run an A/B test of one session per user.

    Args:
      design: of the test.
      progress: called with the sessions served so far, out of num_users × arms.
      observe: called with each block's per-user sums, as `statistics.ABTest.update` takes them.

    Returns:
      {"ab_test": as `statistics.ABTest.results`, "signals": the environment's, as a dictionary, "truncated_pct": {arm:
      share of truncated sessions}}; with hashing also "sample_ratio_mismatch", {"users": {arm: number},
      "p_value"}; if always valid, "always_valid95" in addition to "ci95", and "interim_analyses": [{"users": {arm: so
      far}, "ab_test": as above without coverage and Gini}], starting when every arm has two users.

    Raises:
      ValueError: for an arm that gets fewer than two users.
    """
    names = list(arms)
    test, policies = statistics.ABTest(env.signals, names, design.control, design.paired), rankers.choices(arms)
    assign(names, design)  # refuses arms that are too small before anyone is served
    total = design.total(len(names))
    block = min(block_users(total, partitioner), -(-total // _ANALYSES) if design.always_valid else total)
    cut, done, interim_analyses = dict.fromkeys(names, 0.0), 0, []
    for start in range(0, total, block):
        here = np.arange(start, min(start + block, total))
        means = history_means(env, key, here, day, block) if design.cuped else None
        sums, covariate, quantile = {}, {}, None
        for name, ids in users_of(names, here, design.salt).items():
            sums[name] = rollout_user_metrics(
                env, policies[name], key, partitioner, user_ids=ids, day=day, capacity=block
            )
            cut[name] += float(sums[name]["truncated"].sum())
            for column in NOT_TESTED:
                del sums[name][column]
            if means is not None:
                covariate[name] = means[ids - start]
            done += len(ids)
            progress(done)
        test.update(sums, covariate or None)
        observe(sums)
        if design.always_valid and min(test.users().values()) >= 2:
            quantile = sequential.quantile(min(start + block, total) / total)
            interim_analyses.append({"users": test.users(), "ab_test": test.ratios(quantile)})
    result = conclude(test, env.signals, quantile, cut, test.users())
    return result | ({"interim_analyses": interim_analyses} if interim_analyses else {})
