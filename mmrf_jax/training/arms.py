"""Serving policies to simulated users: the arms of an A/B test, users sharded over the devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax import types
from mmrf_jax.evaluation import ab_test
from mmrf_jax.parallel import mesh as par
from mmrf_jax.simulators import base
from mmrf_jax.training import rollout

_BLOCK = 50_000  # users of a device in one call: progress is seen, and the last sessions of a call cost little
_SLOTS = 256  # the last sessions of a call cost less, the rest no more than with 1,024


@functools.partial(jax.jit, static_argnames=("sim_functions", "num_users", "slots", "k", "mesh"))
def _serve(sim_functions, sim_data, policy, key, first_users, queues, day, *, num_users, slots, k, mesh):
    def one_device(sim_data, policy, key, day, first_user, queue):
        sim = base.Simulator(*sim_functions, *sim_data)
        sums, counts = rollout.rollout(
            sim, policy, key, first_user[0], day, num_users=num_users, slots=slots, k=k, queue=queue[0]
        )
        return sums, counts[None]

    run = par.shard_users(one_device, mesh, num_replicated=4)
    return run(sim_data, policy, key, day, first_users, queues)


def serve(
    sim: base.Simulator,
    policy: base.Policy,
    key: types.Key,
    mesh,
    *,
    first_user: int,
    num_users: int,
    day: int,
    k: int,
    capacity: int | None = None,
) -> dict[str, np.ndarray]:
    """Sums over a session of each of `num_users` users, as `evaluation.ab_test` takes them.

    Every device serves a run of consecutive users; what a user does depends on the key and the user id alone.
    `capacity`, at least num_users, is the size compiled for: calls that share it share the computation.
    """
    devices = mesh.size
    share = -(-(capacity or num_users) // devices)
    first = first_user + share * np.arange(devices, dtype=np.int32)
    queue = np.clip(first_user + num_users - first, 0, share).astype(np.int32)
    sums, counts = _serve(
        sim[:3], sim[3:], policy, key, *par.put_batch((first.astype(np.int32), queue), mesh), jnp.int32(day),
        num_users=share, slots=int(np.clip(share // 4, 16, _SLOTS)), k=k, mesh=mesh,
    )  # fmt: skip
    table = np.asarray(sums, np.float64)[:num_users]
    result: dict[str, np.ndarray] = {name: table[:, i] for i, name in enumerate(rollout.SUMS)}
    result["user_id"] = first_user + np.arange(num_users)
    result["exposures"] = functools.reduce(np.add, np.asarray(counts))  # of one device: no copy
    return result


def compare(
    sim: base.Simulator,
    arms: Mapping[str, base.Policy],
    key: types.Key,
    mesh,
    *,
    control: str,
    num_users: int,
    day: int,
    k: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict:
    """A paired A/B test: the same users, with the same random numbers, in every arm.

    Returns:
      {"ab_test": {arm: {metric: {"mean", "diff_pct", "ci95"}}}, "truncated_pct": {arm: share of sessions cut}}.
    """
    test = ab_test.ABTest(list(arms), control, paired=True)
    block = min(_BLOCK * mesh.size, num_users)
    cut, done = dict.fromkeys(arms, 0.0), 0
    for start in range(0, num_users, block):
        size = min(block, num_users - start)
        sums = {}
        for name, policy in arms.items():
            sums[name] = serve(sim, policy, key, mesh, first_user=start, num_users=size, day=day, k=k, capacity=block)
            cut[name] += float(sums[name].pop("truncated").sum())
            done += size
            progress(done)
        test.update(sums)
    return test.results() | {"truncated_pct": {name: 100.0 * value / num_users for name, value in cut.items()}}
