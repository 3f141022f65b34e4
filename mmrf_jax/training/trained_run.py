"""A trained run as evaluators see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from mmrf_jax import types
from mmrf_jax.envs import rankers
from mmrf_jax.io.progress import phase
from mmrf_jax.parallel import multihost
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.signals import Signals
from mmrf_jax.training import configs, sources, steps
from mmrf_jax.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """What a run has learned, and on what.

    Attributes:
      source: its items are on the devices of `state`.
      plan: the settings of training.
      state: what the run has learned.
      partitioner: of the devices that `state` is on.
      arms: the policies of the run's A/B test in addition to its own.
      begin: (name, program) -> None; announces a phase of evaluation, and waits until a program of that name, which is
        compiled in the background, is ready.
    """

    source: sources.Source
    plan: steps.TrainConfig
    state: TrainState
    partitioner: Partitioner
    arms: Mapping[str, rankers.AnyRanker] = dataclasses.field(default_factory=dict)
    begin: Callable[..., None] = lambda name, program=None: phase(name)

    @property
    def config(self) -> configs.Run:
        return self.source.config

    @property
    def items(self) -> types.Items:
        return self.source.items

    @property
    def signals(self) -> Signals:
        return self.source.spec.signals

    def local(self) -> TrainedRun:
        """Return the run on this process's devices only; all processes must call it."""
        partitioner, state = Partitioner.local(), multihost.to_local(self.state)
        return dataclasses.replace(self, source=self.source.local(), state=state, partitioner=partitioner)
