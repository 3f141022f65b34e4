"""What rollouts cost, counted and not timed: work for each live request, and memory of a million users."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax import random
from mmrf_jax.abtest import simulate
from mmrf_jax.envs import rankers, rollout
from mmrf_jax.envs.short_video import env, parameters, reference_policies
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.signals import SHORT_VIDEO

# In units of a slot's step, as measured on a CPU core: what a step costs whatever its slots, and a reset.
STEP, RESET = 10, 2
LONGEST = 64  # requests of a session


def production():
    return rankers.PrivilegedPolicy(reference_policies.production, 1.0)


@pytest.mark.slow
def test_work_for_a_live_request_is_flat():
    """Slots stepped and reset, idle ones too, for each live request: within 1.3 from 2^13 to 2^15 users.

    Of few users most are still flat but for the end of the queue: slots idle while the longest session goes on, and no
    longer.
    """
    sim, partitioner = (
        env.make_world(parameters.WorldConfig(num_videos=3000, candidates=20, slate=3, history=2)),
        Partitioner(),
    )
    work = []

    def count(units):
        return jax.debug.callback(functools.partial(work.append, units))

    def begin(params, request, history):
        count(STEP + RESET * request.user_id.shape[0])
        return ()

    def score(params, carry, request):
        count(STEP + request.user_id.shape[0])
        slots.add(request.user_id.shape[0])
        return jnp.zeros(request.candidates.shape)

    policy = rankers.Ranker((), begin, score, lambda *_: (), temperature=1.0)
    cost, slots = {}, set()
    for n in (2**9, 2**11, 2**13, 2**15):
        work.clear()
        slots.clear()
        sums = simulate.rollout_user_metrics(sim, policy, jax.random.key(0), partitioner, user_ids=np.arange(n), day=0)
        jax.effects_barrier()
        needed = sums["requests"].sum() + RESET * n
        cost[n] = sum(work) / needed
        assert len(work) > n / 256
        assert sum(work) < 1.3 * needed + LONGEST * (STEP + max(slots)), n
    assert cost[2**13] < 1.3 * cost[2**15] and cost[2**15] < 1.2, cost


@pytest.mark.slow
def test_a_million_users_in_one_call_fit_8_gib(optimised):
    sim, n = env.make_world(parameters.WorldConfig()), 2**20

    def run(sim, key):
        return rollout.rollout(sim, production(), key, 0, 0, num_users=n, slots=simulate._SLOTS)

    memory = jax.jit(run).lower(sim, jax.random.key(0)).compile().memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert n * len(rollout.user_metrics(SHORT_VIDEO)) * 4 < used < 2**30  # the sums, and little else


@pytest.mark.parametrize("first", [0, -1, -(2**31)])
@pytest.mark.parametrize("num", [1, 118])
def test_draws_are_those_of_the_contract(num, first):
    """One fused computation, the same bits, also of ids that have wrapped around."""
    key, users = jax.random.fold_in(jax.random.key(3), 2), first + jnp.arange(64, dtype=jnp.int32) * 33_554_431
    for position in (0, jnp.arange(64, dtype=jnp.int32) + 4096 * 7):
        mine = jax.jit(lambda *x: random.per_user_uniform(*x, num))(key, position, users)
        np.testing.assert_array_equal(mine, random.reference_per_user_uniform(key, position, users, num))


def test_draws_stay_apart_from_their_readers(optimised):
    """The conditions that keep them apart are true of every id, and the compiler must not find out."""
    arguments = (jax.random.key(0), 0, jnp.arange(16, dtype=jnp.int32))
    compiled = jax.jit(lambda *x: random.per_user_uniform(*x, 8)).lower(*arguments).compile().as_text()
    assert compiled.count(" conditional(") == 2
