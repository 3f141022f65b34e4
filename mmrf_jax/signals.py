"""The feedback signals by name. Nothing here needs JAX, so config files can be read without it."""

from __future__ import annotations

#: Feedback signals, in the order of the last axis of every feedback array [..., S] (MMRF, section 3).
SIGNALS = ("click", "long_view", "like", "follow", "comment", "forward", "hate", "profile_enter", "watch_time")
#: The signals that are 0 or 1; `watch_time` is in seconds.
BINARY_SIGNALS = SIGNALS[:-1]
#: Signals with an agent by default; the main agent, which decides the exposure, is the last.
AGENT_SIGNALS = ("click", "like", "follow", "comment", "forward", "hate", "watch_time")
WATCH_TIME = SIGNALS.index("watch_time")


def signal_index(name: str) -> int:
    """Return the position of a signal in a feedback array.

    Raises:
      ValueError: for a name that is not a signal.
    """
    if name not in SIGNALS:
        raise ValueError(f"unknown signal {name!r}; choose among {', '.join(SIGNALS)}")
    return SIGNALS.index(name)
