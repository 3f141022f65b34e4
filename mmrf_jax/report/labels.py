"""Names, units and numbers as the page, the plots and the verdict write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmrf_jax.abtest import statistics
from mmrf_jax.signals import Signals

#: Metric of an A/B test, and signal of short videos -> (name, unit).
_METRICS = {
    "watch_time": ("watch time", "seconds per session"),
    "depth": ("depth", "videos per session"),
    "requests": ("requests", "per session"),
    "return_rate": ("return rate", "share of sessions"),
    "click": ("clicks", "per video"),
    "long_view": ("long views", "per video"),
    "like": ("likes", "per video"),
    "follow": ("follows", "per video"),
    "comment": ("comments", "per video"),
    "forward": ("forwards", "per video"),
    "hate": ("hates", "per video"),
    "profile_enter": ("profile visits", "per video"),
    "coverage": ("catalogue coverage", "share of videos"),
    "gini": ("Gini index", "of exposures"),
    "ild": ("diversity in a slate", ""),
    "visits": ("sessions", "per user and day"),
    "watch_time_per_day": ("watch time per day", "seconds per user and day"),
}
_OFFLINE = {"watch_time_xauc": "watch time, in pairs", "watch_time_median": "watch time above the user's median"}


_UNITS = {"duration": "seconds per session", "count": "per session", "value": "total per session"}


def ordered(signals: Signals, metrics: Mapping[str, Any]) -> list[str]:
    """Return metrics of an A/B test in the order in which they are read: the main one, sizes, signals, all others."""
    sizes = (signals.main, *signals.numeric_names, "depth", "requests", "return_rate")
    usual = dict.fromkeys((*sizes, *signals.binary_names, *_METRICS))
    return [*(m for m in usual if m in metrics), *(m for m in metrics if m not in usual)]


def name(metric: str) -> str:
    """Return the name of a metric or a signal; of an unknown one, its key with spaces."""
    return _METRICS[metric][0] if metric in _METRICS else _OFFLINE.get(metric, metric.replace("_", " "))


def units(signals: Signals, metric: str) -> tuple[str, ...]:
    """Return the unit of a metric, and whether less is better, in a word or two each."""
    unit = _METRICS.get(metric, ("", ""))[1]
    if metric in signals.names:
        unit = _UNITS.get(signals.signals[signals.index(metric)].kind, "per video")
    return (*((unit,) if unit else ()), *(("less is better",) if metric in statistics.lower_is_better(signals) else ()))


def titled(signals: Signals, metric: str) -> str:
    """Return the name of a metric, and whether less is better, as the title of a chart."""
    return f"{name(metric)} (less is better)" if metric in statistics.lower_is_better(signals) else name(metric)


def show(x: float, form: str) -> str:
    """Format a number with a minus sign as wide as a plus; zero has no sign."""
    text = f"{x:{form}}"
    return text.lstrip("-") if not text.strip("-0.") else text.replace("-", "−")


def joined(parts: list[str]) -> str:
    """Join words as a sentence does: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def growth_axes(part: str, unit: str) -> tuple[str, str]:
    """Return the labels of the axes of costs by size, of a part of `mmrf benchmark --suite=scale`."""
    return ("rows of the log" if part == "logs" else f"number of {part}"), ("µs" if unit == "us" else unit)
