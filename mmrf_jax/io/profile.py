"""On-demand `jax.profiler` traces of a run's steps, and what a trace says of the devices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mmrf_jax.io import copies

_COPIES = ("Memcpy", "Memset")  # first words of what a GPU's streams do besides kernels


def parse_steps(steps: str) -> tuple[int, int] | None:
    """Parse "100:110" into the first and last step, counted from 1; return None for "".

    Raises:
      ValueError: for any other text.
    """
    if not steps:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", steps)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"config.profile_steps={steps!r} names no steps; use FIRST:LAST, such as 100:110")
    return int(found[1]), int(found[2])


class Profile:
    """Writes a trace of some steps to a folder, for TensorBoard or Perfetto.

    Args:
      steps: text for `parse_steps`.
      folder: folder of the traces; None writes nothing.
    """

    def __init__(self, steps: str, folder: Path | None):
        self._steps = None if folder is None else parse_steps(steps)
        self._folder, self._on = folder, False

    def before(self, step: int) -> None:
        """Start the trace if needed; call this before each step, counted from 1."""
        if self._steps is not None and self._steps[0] <= step <= self._steps[1] and not self._on:
            assert self._folder is not None
            self._mirror = copies.Mirror(self._folder)
            jax.profiler.start_trace(str(self._mirror.folder))
            self._on = True

    def after(self, step: int, result: Callable[[], Any]) -> None:
        """End the trace after its last step; call this after each step with what gives its result, to wait for it."""
        if self._on and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(result())
            self.close()

    def close(self) -> None:
        """End a trace that is still running, if training ends before the last requested step."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            self._mirror.close()


class DeviceTime(NamedTuple):
    """What the devices of a trace did, from the first kernel to the end of the last: means over devices."""

    seconds: float  # the time between these
    busy: float  # share of the time in which a kernel or a copy was running
    kernels: float  # number of kernels


def device_time(folder: Path) -> DeviceTime:
    """Read the newest trace of a folder. On a CPU, its kernels are the operations that XLA's threads run.

    Raises:
      ValueError: if the trace has no kernel.
    """
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    devices = list(_devices(jax.profiler.ProfileData.from_file(str(newest))))
    devices = [events for events in devices if any(kernel for *_, kernel in events)]
    if not devices:
        raise ValueError(f"{newest} has no kernel; trace steps that run on a device")
    first = min(start for events in devices for start, *_ in events)
    last = max(end for events in devices for _, end, _ in events)
    busy = sum(_covered([event[:2] for event in events]) for events in devices) / len(devices)
    kernels = sum(kernel for events in devices for *_, kernel in events) / len(devices)
    return DeviceTime((last - first) / 1e9, busy / (last - first), kernels)


def _devices(data: Any) -> Iterator[list[tuple[float, float, bool]]]:
    """Yield what each device did: begin and end in ns, and whether it is a kernel."""
    planes = list(data.planes)
    if not any(plane.name.startswith("/device:") for plane in planes):  # a CPU
        planes = [plane for plane in planes if plane.name == "/host:CPU"]
        for plane in planes:
            events = (event for line in plane.lines for event in line.events if "hlo_op" in dict(event.stats))
            yield [(event.start_ns, event.start_ns + event.duration_ns, True) for event in events]
        return
    for plane in planes:
        if plane.name.startswith("/device:"):
            lines = list(plane.lines)
            chosen = [line for line in lines if line.name == "XLA Ops"]  # TPUs
            chosen = chosen or [line for line in lines if line.name.startswith("Stream")]  # GPUs
            yield [
                (event.start_ns, event.start_ns + event.duration_ns, not event.name.startswith(_COPIES))
                for line in chosen
                for event in line.events
            ]


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
