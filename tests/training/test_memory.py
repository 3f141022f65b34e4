"""The estimate of a run's memory: against XLA's own count, and the error for what does not fit."""

import jax
import numpy as np
import pytest
from processes import TINY, error_line

from mmrf_jax.configs import world
from mmrf_jax.data.device_log import Layout
from mmrf_jax.models import encoders
from mmrf_jax.parallel import programs
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import batches, configs, memory, restore, steps

BATCH = 32


@pytest.fixture(scope="module")
def job():
    """The main job's sizes, with fewer videos."""
    config = world.get_config()
    config.world.num_videos, config.train.batch, config.feedback.batch = 3_000, BATCH, BATCH
    config, partitioner = configs.run_of(config.to_dict()), Partitioner()
    source = restore.source_of(config, partitioner)
    plan = steps.plan_of(config, source.spec.signals)
    return config, plan, source, restore.state_shapes(config, source, partitioner), partitioner


def counted(step, job, *more) -> int:
    """Bytes that XLA counts for what a step holds besides its arguments."""
    config, plan, source, shapes, _ = job
    batch = batches.example_batch(source.spec, BATCH, config.train.segment)
    options = programs._OPTIONS["few"]
    jitted = jax.jit(step.__wrapped__, static_argnames="plan", donate_argnums=0, compiler_options=options)
    lowered = jitted.lower(shapes, batch, source.items, plan, np.float32(1.0), *more)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_the_fit_takes_what_xla_counts(job, optimised):
    assert memory.estimate_memory(*job).fit == pytest.approx(counted(steps.fit_step, job), rel=0.15)


@pytest.mark.nightly
def test_an_update_takes_what_xla_counts(job, optimised):
    _, plan, source, _, _ = job
    size = (2, source.items.num_videos, encoders.sizes(plan.feedback, source.spec)[1])
    encodings = jax.ShapeDtypeStruct(size, np.float32)
    assert memory.estimate_memory(*job).update == pytest.approx(counted(steps.update_step, job, encodings), rel=0.15)


def test_the_parts_of_an_estimate(job):
    config, plan, source, shapes, partitioner = job
    found = memory.estimate_memory(*job)
    assert found.log == found.collect == 0.0
    arrays = [x for x in jax.tree.leaves(shapes) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    keys = len(jax.tree.leaves(shapes)) - len(arrays)
    assert found.state == sum(x.size * x.dtype.itemsize for x in arrays) + 8 * keys
    assert found.total == found.state + found.items + max(found.fit, found.update)
    three = memory.estimate_memory(*job, seeds=3)  # the states one by one and, at the start of a phase, joined
    assert three.state == 6 * found.state and (three.fit, three.update) == (3 * found.fit, 3 * found.update)
    run = configs.override(
        config, train={"batch": 2 * BATCH, "log_on_device": True}, collect={"sessions": 1_000, "slots": 64}
    )
    layout, more = Layout.of(source.spec), memory.estimate_memory(run, plan, source, shapes, partitioner)
    assert more.update == 2 * found.update and more.fit == found.fit
    assert more.log == 1_000 * (layout.bytes_per_session + 18 * layout.bytes_per_request)
    assert more.collect == more.log + 64 * 64 * layout.bytes_per_request


@pytest.mark.parametrize(
    ("limit", "sizes", "message"),
    [
        (
            3.0,
            (2, 2, 1),
            "config.train.batch=32 takes about 4.00 GiB per device, all else included, but only 3.00 GiB are available",
        ),
        (3.0, (2, 2, 1), "; use --config.train.batch=16$"),
        (3.0, (1, 2, 1), "config.feedback.batch=32 takes .*; use --config.feedback.batch=16$"),
        (3.5, (1, 2, 3), "config.collect.sessions=8192 takes .*; use --config.collect.sessions=5120$"),
        (1.5, (2, 2, 1), "; use --config.train.log_on_device=False$"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(job, limit, sizes, message):
    """State and items take half a GiB each, the log one."""
    config, *_, partitioner = job
    update, fit, collect = (size * 2.0**30 for size in sizes)
    if fit == update:
        fit = 0.0
    half = 2.0**29
    found = memory.MemoryEstimate(half, half, 2 * half, collect, fit, update)
    run = configs.override(config, collect={"sessions": 8_192})
    memory.check_memory(run, found, partitioner)  # a CPU reports no limit
    with pytest.raises(ValueError, match=message):
        memory.check_memory(_limited(run, limit), found, partitioner)
    memory.check_memory(_limited(run, found.total / 2**30), found, partitioner)


def _limited(run: configs.Run, limit: float) -> configs.Run:
    return configs.run_of(configs.as_dict(run) | {"memory_limit": limit})


@pytest.mark.slow
def test_a_run_that_does_not_fit_ends_before_it_compiles_a_step(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    done = launch("train", *TINY, "--config.memory_limit=0.01", f"--workdir={tmp_path / 'run'}")
    error_line(done, "GiB per device, all else included, but only 0.01 GiB are available; use ")
    assert "jit(fit_step)" not in done.stderr and not (tmp_path / "run").exists()
