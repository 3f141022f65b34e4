"""Work, network traffic and memory of the main job's steps per chip of a pod, counted in compiled programs.

XLA partitions the steps for as many virtual CPU devices as there are (JAX_NUM_CPU_DEVICES): the program of one of them
shows the bytes that go over the network and the memory of a device. No pod is needed, and nothing is computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax.cli.benchmarks import cost
from mmrf_jax.configs import world as experiment
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.envs import rollout
from mmrf_jax.models import encoders
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import batches, configs, restore, steps

_COLLECTIVE = re.compile(
    r" = (.+?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_BITS = {"pred": 8, "bf16": 16}


def pod(segments: int, videos: int) -> list[dict[str, Any]]:
    """Return the work, network traffic and memory of one device per step.

    Args:
      segments: of a batch, per device.
      videos: of the world; tables of 2^20 rows or more are split over the devices.
    """
    devices = jax.device_count()
    config = experiment.get_config()
    config.world.num_videos = videos
    config.train.batch = config.feedback.batch = segments * devices
    run, one, every = configs.run_of(config.to_dict()), Partitioner(jax.devices()[:1]), Partitioner()
    source = restore.source_of(run, one)
    plan = steps.plan_of(run, source.spec.signals)
    state = restore.state_shapes(run, source, every)
    assert state.feedback is not None
    found = [("devices", devices, ""), ("segments of a batch, per device", segments, ""), ("videos", videos, "")]
    found += list(_logged(source.spec))
    found += [("parameters, tables not counted", _bytes(state.agents.params, state.feedback.params), "bytes")]
    found += [("state of each device", _bytes(state), "bytes")]
    for name, step, tail in (("fit", steps.fit_step, ()), ("update", steps.update_step, (_encodings(plan, source),))):
        found += [(f"{name}, {what}", value, unit) for what, value, unit in _step(step, run, plan, source, tail, every)]
    return [{"name": name, "value": float(value), "unit": unit} for name, value, unit in found]


def _logged(spec: InputSpec) -> Iterator[tuple[str, int, str]]:
    """Yield the bytes of a log in memory (`SessionLog`), and of a user's sums in an A/B test."""
    feedback = 4 * len(spec.signals)
    session = 4 + 4 + 4 * spec.profile + spec.history * (4 + feedback + 1) + 1 + 1 + 8
    request = 4 * spec.context + 4 * spec.candidates + spec.slate * (4 + feedback) + 4
    yield "log, a session without its requests", session, "bytes"
    yield "log, a request", request, "bytes"
    yield "A/B test, sums of a user", 4 * len(rollout.user_metrics(spec.signals)), "bytes"


def _step(step: Any, run: configs.Run, plan: Any, source: Any, tail: tuple, every: Partitioner) -> Iterator[tuple]:
    """Yield (what, value, unit) of one device and one step."""

    def arguments(partitioner: Partitioner) -> tuple:
        replicated, split = partitioner.replicated_sharding, partitioner.data_sharding
        size = run.train.batch // every.num_devices * partitioner.num_devices
        return (
            restore.state_shapes(run, source, partitioner),
            _shapes(batches.example_batch(source.spec, size, run.train.segment), split),
            _shapes(source.items, replicated),
            *(_shapes(x, replicated) for x in (np.float32(1.0), *tail)),
        )

    def call(state: Any, batch: Any, items: Any, lr_scale: Any, *encodings: Any) -> Any:
        return step(state, batch, items, plan, lr_scale, *encodings)

    work = cost.work(call, *arguments(Partitioner(jax.devices()[:1])))
    yield "operations", work.flops, ""
    yield "memory traffic", work.bytes, "bytes"
    state, batch, items, *rest = arguments(every)
    compiled = step.lower(state, batch, items, plan, *rest).compile()
    moved = list(_collectives(compiled.as_text()))
    yield "collectives", len(moved), ""
    yield "results of collectives", sum(moved), "bytes"
    memory = compiled.memory_analysis()
    yield "arguments", memory.argument_size_in_bytes, "bytes"
    yield "temporaries", memory.temp_size_in_bytes, "bytes"


def _encodings(plan: Any, source: Any) -> Any:
    """Return the shape of the catalogue's encodings, if updates read them."""
    if not steps.precomputes_item_embeddings(plan, source.items):
        return None
    spec: InputSpec = source.spec
    return jax.ShapeDtypeStruct((2, source.items.num_videos, encoders.sizes(plan.feedback, spec)[1]), jnp.float32)


def _shapes(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _bytes(*trees: Any) -> int:
    """Return the bytes of arrays on each device; keys are of 8 bytes."""

    def one(x: Any) -> int:
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return math.prod(x.sharding.shard_shape(x.shape)) * (8 if key else x.dtype.itemsize)

    return sum(map(one, jax.tree.leaves(trees)))


def _collectives(text: str) -> Iterator[int]:
    """Yield the bytes of the result of each collective operation of a compiled program."""
    for shape in _COLLECTIVE.findall(text):
        yield sum(
            (_BITS.get(kind) or int(re.sub(r"\D", "", kind))) // 8 * math.prod(int(n) for n in sizes.split(",") if n)
            for kind, sizes in _ARRAY.findall(shape)
        )
