"""A log that is collected on the devices is the one that the host collects."""

import dataclasses

import jax
import numpy as np
import pytest

from mmrf_jax.envs import collect, device_collection, rankers
from mmrf_jax.envs.short_video import env, parameters, reference_policies
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import batches, simulator_source

CONFIG = parameters.WorldConfig(num_videos=3000, candidates=20, slate=3, history=4, max_requests=6)
FIRST, SESSIONS, DAY, SLOTS, DISCOUNT = 77, 150, 3, 37, 0.9


def on_devices(partitioner, progress=lambda done: None):
    sim, policy = env.make_world(CONFIG), rankers.PrivilegedPolicy(reference_policies.production, 1.0)
    return device_collection.collect_on_devices(
        sim,
        policy,
        jax.random.key(0),
        partitioner,
        simulator_source.world_spec(sim, CONFIG),
        first_user=FIRST,
        num_sessions=SESSIONS,
        day=DAY,
        discount=DISCOUNT,
        slots=SLOTS,
        progress=progress,
    )


def on_host():
    sim, policy = env.make_world(CONFIG), rankers.PrivilegedPolicy(reference_policies.production, 1.0)
    return collect.collect(
        sim,
        policy,
        jax.random.key(0),
        first_user=FIRST,
        num_sessions=SESSIONS,
        day=DAY,
        slots=SLOTS,
    )


def compare(held, log, equal=np.testing.assert_array_equal):
    found = held.head(SESSIONS)
    for field in dataclasses.fields(log):
        if field.name != "scores":
            equal(getattr(found, field.name), getattr(log, field.name), err_msg=field.name)
    assert (held.num_sessions, held.num_requests) == (log.num_sessions, log.num_requests)
    for here, there in zip(held.feedback_statistics, batches.feedback_statistics(log, DISCOUNT), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-6)


@pytest.mark.slow
def test_the_log_is_the_hosts():
    done = []
    held = on_devices(Partitioner(), done.append)
    assert done == sorted(done) and done[-1] == SESSIONS
    compare(held, on_host())


def close(here, there, err_msg):
    np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-5, err_msg=err_msg)


@pytest.mark.slow
def test_four_devices_collect_the_same(run_python):
    """Each its share of the users, and the last one fewer."""
    run_python(SCRIPT, devices=4)


SCRIPT = """
import sys
sys.path.insert(0, "tests/envs")
import test_device_collection as test
from mmrf_jax.parallel.partitioner import Partitioner

partitioner = Partitioner()
assert partitioner.num_devices == 4 and test.SESSIONS % 4
held = test.on_devices(partitioner)
assert all(x.sharding.is_equivalent_to(partitioner.data_sharding, 2) for x in held.rows)
test.compare(held, test.on_host(), test.close)
"""
