"""Feedback signals as data. This module does not import JAX, so config files can be read without it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

KINDS = ("binary", "duration", "count", "value")
#: Seconds of one unit of a duration.
UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
#: Names of sums and metrics of users and sessions, which no signal may have.
RESERVED = (
    *("depth", "requests", "ild", "returned", "truncated", "next_visit", "sessions", "user_days", "user_id"),
    *("exposures", "return_rate", "visits", "coverage", "gini", "continuation"),
)


@dataclasses.dataclass(frozen=True)
class Signal:
    """One kind of feedback to a shown item, such as `Signal("watch_time", "watch_ms", kind="duration", unit="ms")`.

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
      ValueError: for repeated names, names of other metrics, agents of unknown signals, or no agent.
    """

    signals: tuple[Signal, ...]
    agents: tuple[str, ...]

    def __post_init__(self):
        if len(set(self.names)) < len(self.names) or not self.names:
            raise ValueError(f"signals {', '.join(self.names)}: name at least one, each once")
        if taken := [name for name in self.names if name in RESERVED]:
            raise ValueError(
                f"signal {taken[0]} has the name of another metric; use another, such as {taken[0]}_signal"
            )
        if len(set(self.agents)) < len(self.agents) or not self.agents:
            raise ValueError(f"agents {', '.join(self.agents)}: name at least one signal, each once")
        for name in self.agents:
            self.index(name)

    def __len__(self) -> int:
        return len(self.signals)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Signals:
        """Make signals from their fields, as `as_dict`, `dataclasses.asdict` and JSON give them.

        Raises:
          TypeError: for a missing or unknown field.
          ValueError: for signals that cannot be.
        """
        return cls(tuple(Signal(**signal) for signal in values["signals"]), tuple(values["agents"]))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, which `from_dict` reads back, as JSON would give them."""
        return {"signals": [dataclasses.asdict(signal) for signal in self.signals], "agents": list(self.agents)}

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
        return self.of_kind("binary")

    @property
    def numeric(self) -> tuple[int, ...]:
        """Positions of the other signals: durations, counts and values."""
        return self.of_kind("duration", "count", "value")

    @property
    def amounts(self) -> tuple[int, ...]:
        """Positions of the durations and counts, which are 0 or more and often have a few large values."""
        return self.of_kind("duration", "count")

    @property
    def binary_names(self) -> tuple[str, ...]:
        """Names of the binary signals."""
        return tuple(self.names[i] for i in self.binary)

    @property
    def numeric_names(self) -> tuple[str, ...]:
        """Names of the other signals."""
        return tuple(self.names[i] for i in self.numeric)

    def of_kind(self, *kinds: str) -> tuple[int, ...]:
        """Return the positions of the signals of some kinds."""
        return tuple(i for i, signal in enumerate(self.signals) if signal.kind in kinds)

    def sign(self, name: str) -> int:
        """Return 1 where more of a signal is better, -1 where more is worse."""
        return self.signals[self.index(name)].sign

    def choose(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return `names`, which suit short videos, if these are the signals; for others all names."""
        return names if self.names == SHORT_VIDEO.names else self.names

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
    ("click", "like", "follow", "comment", "forward", "hate", "watch_time"),
)


def parse_reward(text: str, names: Sequence[str]) -> dict[str, float]:
    """Parse a weighted sum of signals, such as `watch_time + 3*like - 0.5*hate`.

    Args:
      text: names and numbers with +, - and *; each term has one name.
      names: of the signals.

    Returns:
      {signal: weight}, in the order of the text; of a name that comes twice the sum.

    Raises:
      ValueError: for another name, or a text of another form.
    """
    known = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    tokens = re.findall(rf"(?:{known})(?!\w)|{_NUMBER}|\w+|\S", text)
    weights: dict[str, float] = {}
    weight, name, expects = 1.0, "", True  # of the term so far, and whether a name or a number must follow
    for token in (*tokens, ""):
        if expects and token in ("+", "-"):
            weight *= -1.0 if token == "-" else 1.0
        elif expects and token in names and not name:
            name, expects = token, False
        elif expects and re.fullmatch(_NUMBER, token):
            weight, expects = weight * float(token), False
        elif expects and re.fullmatch(r"\w+", token) and token not in names:
            raise ValueError(f"unknown signal {token!r}; choose among {', '.join(names)}")
        elif not expects and token == "*":
            expects = True
        elif not expects and name and token in ("+", "-", ""):
            weights[name] = weights.get(name, 0.0) + weight
            weight, name, expects = -1.0 if token == "-" else 1.0, "", True
        else:
            what = f"{token!r} cannot stand there" if token else "its end is missing"
            raise ValueError(f"{what}; write it as in 'watch_time + 3*like - 5*hate'")
    return weights
