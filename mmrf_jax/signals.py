"""Names of the feedback signals. This module does not import JAX, so config files can be read without it."""

from __future__ import annotations

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
