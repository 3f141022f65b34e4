"""What happens around the steps of a run: profile, metrics, checkpoints; and wall time by activity."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax.checkpointing import manager
from mmrf_jax.io import metric_writer, profile
from mmrf_jax.io.progress import say
from mmrf_jax.parallel import preemption, programs
from mmrf_jax.training import batches, configs
from mmrf_jax.training.train_state import TrainState

_LARGE = 2**22  # array entries; larger arrays are checked on the device

#: Phase -> reported activity; phases that are not listed count as "evaluating".
_KINDS = {"prepare": "preparing", "read": "collecting", "collect": "collecting", "fit": "fitting", "train": "training"}


class Hooks:
    """The hooks of a run's steps; never saves a state that is not finite.

    A phase of a round calls `begin`, then `before_step` and `after_step` around each of its steps. `after_step` calls

    1. the profile, which ends its trace,
    2. the metrics, every `log_every` steps, one logging step late: reading those does not block on the device,
    3. the checkpoints, every `checkpoint_every` steps.

    As a context manager it saves the current state if the run is preempted inside.

    Args:
      config: of the run.
      writer: of its metrics.
      checkpoints: of its state.
      trace: its profile.
      step: steps of the whole run so far: fits and updates.
      name: of the run in its errors and lines, if it is one of several.
    """

    def __init__(
        self,
        config: configs.Run,
        writer: metric_writer.MetricsWriter,
        checkpoints: manager.Checkpoints,
        trace: profile.Profile,
        step: int,
        name: str = "",
    ):
        self.step = step
        self._config, self._writer, self._checkpoints, self._trace = config, writer, checkpoints, trace
        self._name = f"{name}: " if name else ""
        self._state: Callable[[], TrainState] | None = None
        self._pending: tuple[int, str, Callable[[], Any]] | None = None
        self._good = step  # the last step whose metrics were finite

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, kind, *_: object) -> None:
        self._trace.close()
        if kind is preemption.Preempted and self._state is not None:
            self.save(force=True)
            self._checkpoints.wait()
            say(f"{self._name}saved step {self.step}")

    def hold(self, state: TrainState) -> None:
        """Set the run's current state."""
        self._state = lambda: state

    def begin(self, name: str, iterator: batches.PhaseIterator) -> None:
        """Begin a phase.

        Args:
          name: the phase of its rows in metrics.jsonl.
          iterator: its steps.
        """
        self._phase, self._iterator = name, iterator

    def before_step(self) -> None:
        """Start a trace if this step is the first to profile."""
        self._trace.before(self.step + 1)

    def after_step(self, state: Callable[[], TrainState], metrics: Callable[[], Any], save: bool = True) -> None:
        """Call the hooks in their order.

        Args:
          state: gives the state after the step.
          metrics: waits for the metrics of the step and gives them.
          save: whether the state may be saved now; False before the end of a round, whose save follows.

        Raises:
          FloatingPointError: for metrics, or a state to save, that are not finite.
        """
        self._state = state
        self._trace.after(self.step + 1, state)
        self.step += 1
        last = self._iterator.position == self._iterator.total
        if self.step % self._config.log_every == 0 or last:
            self.flush()
            self._pending = (self.step, self._phase, metrics)
        if last:
            self.flush()
        if save and self.step % self._config.checkpoint_every == 0:
            self.save()

    def flush(self) -> None:
        """Write the metrics that are still on the device."""
        if self._pending is None:
            return
        (at, phase, metrics), self._pending = self._pending, None
        self.write(phase, metrics(), at)

    def write(self, phase: str, metrics: Any, at: int | None = None) -> None:
        """Write a row of metrics, of this step if `at` is None."""
        at = self.step if at is None else at
        try:
            self._writer.write(at, phase, metrics)
        except FloatingPointError as error:
            raise FloatingPointError(f"{self._name}steps {self._good + 1} to {at}: {error}") from error
        self._good = at

    def save(self, force: bool = False, again: bool = False) -> None:
        """Write the metrics and save the current state; the arguments are those of `Checkpoints.save`."""
        self.flush()
        assert self._state is not None
        state = self._state()
        if not _finite(state):
            first = min(self._good + 1, self.step)  # its metrics may be finite nevertheless
            raise FloatingPointError(
                f"{self._name}steps {first} to {self.step}: the state after step {self.step} is not finite and is not "
                "saved; lower the learning rate"
            )
        self._writer.sync()  # a resumed run needs the rows up to its checkpoint
        self._checkpoints.save(self.step, state, force=force, again=again)


def _finite(tree: Any) -> bool:
    """Return whether every floating-point number of a state is finite; all processes agree."""
    for x in jax.tree.leaves(tree):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        # Checking small arrays on the host avoids compiling a program for each; large ones may be sharded.
        small = x.size <= _LARGE and x.is_fully_replicated
        if not (np.isfinite(np.asarray(x)).all() if small else _all_finite(x)):
            return False
    return True


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


class PhaseTimes:
    """Wall time in seconds since construction, by activity, with compilation separate.

    Args:
      ahead: background compiler; time spent waiting for it counts as compilation.
      clock: monotonic clock in seconds.
    """

    def __init__(self, ahead: programs.Ahead, clock: Callable[[], float] = time.monotonic):
        self._compiling = programs.CompileClock()
        self._ahead, self._clock = ahead, clock
        self._kind, self._since = "preparing", self._now()
        self._spent = dict.fromkeys([*_KINDS.values(), "evaluating"], 0.0)

    def __enter__(self) -> PhaseTimes:
        return self

    def __exit__(self, *_: object) -> None:
        self._compiling.close()

    def begin(self, phase: str) -> None:
        """Start a phase; time from now on is attributed to it."""
        now = self._now()
        self._spent[self._kind] += (now[0] - self._since[0]) - (now[1] - self._since[1])
        self._kind, self._since = _KINDS.get(phase, "evaluating"), now

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far: "compiling", "preparing", "collecting", "fitting", "training" and "evaluating"."""
        self.begin("results")
        return {"compiling": self._now()[1], **self._spent}

    def _now(self) -> tuple[float, float]:
        """Return the clock in seconds, and how many of them the run has waited for compilation."""
        return self._clock(), self._compiling.seconds + self._ahead.waited


def describe_times(seconds: dict[str, float]) -> str:
    """Return the times as one line of text."""
    total = sum(seconds.values())
    return f"time: {total:.0f} s, of which " + ", ".join(f"{kind} {value:.0f}" for kind, value in seconds.items())
