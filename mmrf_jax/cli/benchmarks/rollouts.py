"""Cost of a live user request in the world, by the number of users in one call."""

from __future__ import annotations

import time

import numpy as np

from mmrf_jax import types
from mmrf_jax.abtest import simulate
from mmrf_jax.envs.short_video import env, parameters
from mmrf_jax.io.progress import Progress
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import simulator_source

_USERS = tuple(2**e for e in (10, 12, 14, 17, 20))
_CALL_USERS = 2**15  # fewer users are served in several calls per timing, at most 16


def rollouts(repeats: int, max_users: int) -> list[dict]:
    """Measure wall and processor time of a live request for each number of users; the sizes take turns."""
    partitioner = Partitioner()
    sim, policy = env.make_world(parameters.WorldConfig()), simulator_source.world_policies()["production"]
    sim = partitioner.replicate(sim)
    key = types.make_key(1)
    sizes = [n for n in _USERS if n <= max_users]
    times: dict[int, list[tuple[float, float]]] = {n: [] for n in sizes}
    with Progress("rollouts", (repeats + 1) * sum(max(n, _CALL_USERS) for n in sizes), unit="users") as progress:
        done = 0
        for repeat in range(repeats + 1):  # the first compiles
            for n in sizes:
                calls = min(16, max(1, _CALL_USERS // n)) if repeat else 1
                wall, cpu, live = time.perf_counter(), time.process_time(), 0.0
                for call in range(calls):
                    first = (16 * repeat + call) * n % 2**26
                    sums = simulate.rollout_user_metrics(
                        sim, policy, key, partitioner, user_ids=np.arange(first, first + n), day=0
                    )
                    live += sums["requests"].sum()
                cost = ((time.perf_counter() - wall) / live, (time.process_time() - cpu) / live)
                if repeat:
                    times[n].append(cost)
                done += max(n, _CALL_USERS)
                progress.update(done)
    median = {n: 1e6 * np.median(x, axis=0) for n, x in times.items()}
    return [
        {"name": f"rollout/{what}/users={n}", "value": float(median[n][i]), "unit": "us per live request"}
        for i, what in enumerate(("wall", "cpu"))
        for n in sizes
    ] + [
        {
            "name": f"rollout/{what}/dearest_to_cheapest",
            "value": float(max(m[i] for m in median.values()) / min(m[i] for m in median.values())),
            "unit": "ratio",
        }
        for i, what in enumerate(("wall", "cpu"))
    ]
