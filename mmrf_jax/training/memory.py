"""The memory that a run needs on each device: a formula, and a check before anything is compiled.

The factors of the steps are those of XLA's own count for CPUs, within 15 % (`tests/training/test_memory.py`).
docs/accelerators.md has the formula.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from mmrf_jax.data.device_log import Layout
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.envs import collect
from mmrf_jax.models import encoders
from mmrf_jax.models.encoder_config import EncoderConfig
from mmrf_jax.models.feedback_model.config import TWINS
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import configs, sources, steps
from mmrf_jax.training.train_state import TrainState

_GIB = 2**30
_FLOAT = 4  # bytes
_REQUESTS = 18  # of a session, where only the log itself will tell: of trained agents in the world
_LONGEST = 64  # requests of the longest sessions, at whose end most slots are empty
# Copies that a step holds at its peak: of memories and of videos' layers, and outputs per candidate and signal.
_FIT_MEMORIES, _FIT_VIDEOS = 8, 3
_MEMORIES, _VIDEOS, _OUTPUTS = 11, 4, 12


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each device."""

    state: float  # parameters, optimisers, tables, the policy that collects
    items: float  # of the catalogue: features, the world's own, and the encodings of a round
    log: float  # that stays on the devices
    collect: float  # further, while it is collected
    fit: float  # of a step of the fit, in addition to the state
    update: float  # of an update

    @property
    def total(self) -> float:
        """The most that is held at a time."""
        return self.state + self.items + self.log + max(self.collect, self.fit, self.update)


def estimate_memory(
    config: configs.Run,
    plan: steps.TrainConfig,
    source: sources.Source,
    shapes: TrainState,
    partitioner: Partitioner,
    seeds: int = 1,
) -> MemoryEstimate:
    """Estimate the memory of a run, or of several side by side.

    Args:
      shapes: those of the state of one, with shardings.
      seeds: number of runs. Between phases each device has the states of all; as steps begin, also its share of them
        joined.
    """
    devices, spec = partitioner.num_devices, source.spec
    world = source.items if source.sim is None else source.sim.default_params  # its items are the same
    encodings = 0
    if steps.precomputes_item_embeddings(plan, source.items):
        encodings = _FLOAT * TWINS * source.items.num_videos * encoders.sizes(plan.feedback, spec)[1]
    log = collected = 0.0
    if config.train.log_on_device:
        layout, number = Layout.of(spec), config.collect.sessions / devices
        log = number * (layout.bytes_per_session + _REQUESTS * layout.bytes_per_request)
        slots = config.collect.slots or collect.slots_for(math.ceil(number))
        collected = log + _LONGEST * slots * layout.bytes_per_request
    leaves = jax.tree.leaves(shapes)
    state = float(seeds * sum(_bytes(x, x.sharding) for x in leaves))
    if seeds > 1:
        state += seeds / devices * sum(_bytes(x) for x in leaves)
        encodings *= seeds
    return MemoryEstimate(
        state=state,
        items=float(encodings + sum(getattr(x, "nbytes", 0) for x in jax.tree.leaves(world))),
        log=seeds * log,
        collect=collected,
        fit=seeds * _fit(config, plan, spec) * config.feedback.batch / devices if plan.use_feedback_model else 0.0,
        update=seeds * _update(config, plan, spec) * config.train.batch / devices,
    )


def _bytes(x: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None = None) -> int:
    """Return the bytes of an array, or of what each device has of it."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return 8
    return math.prod(x.shape if sharding is None else sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _widths(config: EncoderConfig, spec: InputSpec) -> tuple[int, int]:
    """Return the numbers of a user memory, L F D, and of a video's layers: inputs, hidden layer, encoding."""
    dim = encoders.sizes(config, spec)[1]
    inputs = config.id_dim + config.author_dim + config.tag_dim + spec.item_features
    return len(config.decays) * config.feedback_dim * dim, inputs + encoders.ITEM_HIDDEN + dim


def _fit(config: configs.Run, plan: steps.TrainConfig, spec: InputSpec) -> int:
    """Return the bytes of a segment in the fit."""
    memory, video = _widths(plan.feedback, spec)
    t, seen = config.train.segment, spec.history + config.train.segment * spec.slate
    candidates = 0  # encoded without a gradient
    if plan.feedback.debias is not None:
        candidates = t * (spec.candidates if plan.others is None else plan.others + spec.slate)
    return _FLOAT * TWINS * (_FIT_MEMORIES * t * memory + (_FIT_VIDEOS * seen + candidates) * video)


def _update(config: configs.Run, plan: steps.TrainConfig, spec: InputSpec) -> int:
    """Return the bytes of a segment in an update."""
    memory, video = _widths(plan.agents, spec)
    candidates = spec.candidates if plan.others is None else plan.others + spec.slate
    outputs = _OUTPUTS * len(spec.signals) * candidates
    request = (_MEMORIES + plan.slates) * memory + _VIDEOS * (1 + plan.slates) * spec.slate * video + outputs
    return _FLOAT * ((config.train.segment + 1) * request + _VIDEOS * spec.history * video)


def check_memory(config: configs.Run, found: MemoryEstimate, partitioner: Partitioner, seeds: int = 1) -> None:
    """Refuse a run that does not fit the devices, or several side by side.

    Raises:
      ValueError: naming what takes most, both amounts of memory, and what to use instead.
    """
    limit = config.memory_limit * _GIB or (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    if found.total <= limit:
        return
    sizes = {
        "train.batch": (found.update, config.train.batch),
        "feedback.batch": (found.fit, config.feedback.batch),
        "collect.sessions": (found.collect, config.collect.sessions),
    }
    field, (taken, size) = max(sizes.items(), key=lambda entry: entry[1][0])
    left = limit - found.state - found.items
    share = left / (found.log + taken) if field == "collect.sessions" else (left - found.log) / max(taken, 1.0)
    fits = int(size * share) // partitioner.num_devices * partitioner.num_devices
    fix = f"--config.{field}={fits}"
    if fits < partitioner.num_devices:
        fix = "--config.train.log_on_device=False" if found.log else "more devices"
        fix += f", or fewer than --config.seeds={seeds}" if seeds > 1 else ""
    raise ValueError(
        f"config.{field}={size} takes about {found.total / _GIB:.2f} GiB per device, all else included, but only "
        f"{limit / _GIB:.2f} GiB are available; use {fix}"
    )
