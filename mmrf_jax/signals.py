"""Names of the feedback signals. This module does not import JAX, so config files can be read without it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

#: Feedback signals, in the order of the last axis of every feedback array [..., S] (MMRF, section 3).
SIGNALS = ("click", "long_view", "like", "follow", "comment", "forward", "hate", "profile_enter", "watch_time")
#: Binary (0/1) signals; `watch_time` is in seconds.
BINARY_SIGNALS = SIGNALS[:-1]
#: Signals with an agent by default; the last is the main agent, which decides the exposure.
AGENT_SIGNALS = ("click", "like", "follow", "comment", "forward", "hate", "watch_time")
WATCH_TIME = SIGNALS.index("watch_time")


def signal_index(name: str) -> int:
    """Return the position of a signal in a feedback array.

    Raises:
      ValueError: if the name is not a signal.
    """
    if name not in SIGNALS:
        raise ValueError(f"unknown signal {name!r}; choose among {', '.join(SIGNALS)}")
    return SIGNALS.index(name)


KINDS = ("binary", "duration", "count", "value")
#: Seconds of one unit of a duration.
UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


@dataclasses.dataclass(frozen=True)
class Signal:
    """One kind of feedback to a shown item.

    Attributes:
      name: of the signal, in feedback arrays, metrics and results.
      column: of a log; None where it is the name.
      kind: `binary` (0 or 1), `duration` (seconds, 0 or more), `count` (0, 1, 2, …) or `value` (any number, such as a
        rating).
      sign: 1 where more is better, -1 where more is worse.
      unit: of a duration's column: `ms`, `s`, `min` or `h`; feedback arrays are in seconds.
      weight: of the signal's loss; rare signals need more, or they leave no trace.

    Raises:
      ValueError: for another kind, sign or unit, or an empty name.
    """

    name: str
    column: str | None = None
    kind: str = "binary"
    sign: int = 1
    unit: str = "s"
    weight: float = 1.0

    def __post_init__(self):
        if not self.name:
            raise ValueError(f"a signal has the name {self.name!r}; name it")
        for field, among in (("kind", KINDS), ("sign", (1, -1)), ("unit", tuple(UNITS))):
            if (value := getattr(self, field)) not in among:
                raise ValueError(f"signal {self.name} has {field}={value!r}; choose among {', '.join(map(str, among))}")
        if not 0.0 <= self.weight < math.inf:
            raise ValueError(f"signal {self.name} has weight={self.weight!r}; use a finite number, 0 or more")


@dataclasses.dataclass(frozen=True)
class Signals:
    """The signals of a log or an environment, in the order of the last axis of every feedback array [..., S].

    Attributes:
      signals: S signals with different names.
      agents: names of those with an agent; the last is the main agent, whose scores decide what is shown.

    Raises:
      ValueError: for repeated names, agents of unknown signals, or no agent.
    """

    signals: tuple[Signal, ...]
    agents: tuple[str, ...]

    def __post_init__(self):
        if len(set(self.names)) < len(self.names) or not self.names:
            raise ValueError(f"signals {', '.join(self.names)}: name at least one, each once")
        if len(set(self.agents)) < len(self.agents) or not self.agents:
            raise ValueError(f"agents {', '.join(self.agents)}: name at least one signal, each once")
        for name in self.agents:
            self.index(name)

    def __len__(self) -> int:
        return len(self.signals)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Signals:
        """Make signals from their fields, as `dataclasses.asdict` and JSON give them.

        Raises:
          TypeError: for a missing or unknown field.
          ValueError: for signals that cannot be.
        """
        return cls(tuple(Signal(**signal) for signal in values["signals"]), tuple(values["agents"]))

    @property
    def described(self) -> str:
        """Return the names and kinds in one line, such as `like (binary), watch_time (duration)`."""
        return ", ".join(f"{signal.name} ({signal.kind})" for signal in self.signals)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the signals."""
        return tuple(signal.name for signal in self.signals)

    @property
    def main(self) -> str:
        """Name of the main agent's signal."""
        return self.agents[-1]

    @property
    def binary(self) -> tuple[int, ...]:
        """Positions of the binary signals."""
        return tuple(i for i, signal in enumerate(self.signals) if signal.kind == "binary")

    def index(self, name: str) -> int:
        """Return the position of a signal in a feedback array.

        Raises:
          ValueError: if the name is not a signal.
        """
        if name not in self.names:
            raise ValueError(f"unknown signal {name!r}; choose among {', '.join(self.names)}")
        return self.names.index(name)


#: The signals of the short-video world and of KuaiRand.
SHORT_VIDEO = Signals(
    (
        Signal("click"),
        Signal("long_view"),
        *(Signal(name, weight=3.0) for name in ("like", "follow", "comment", "forward")),
        Signal("hate", sign=-1, weight=3.0),
        Signal("profile_enter", weight=2.0),
        Signal("watch_time", kind="duration"),
    ),
    AGENT_SIGNALS,
)
