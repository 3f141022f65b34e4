"""Names, units and numbers as the page, the plots and the verdict write them."""

from __future__ import annotations

#: Metric of an A/B test -> (name, unit).
METRICS = {
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
    "gini": ("Gini index of exposures", ""),
    "ild": ("diversity in a slate", ""),
    "visits": ("sessions", "per user and day"),
    "watch_time_per_day": ("watch time per day", "seconds per user and day"),
}
_OFFLINE = {"watch_time_xauc": "watch time, in pairs", "watch_time_median": "watch time above the user's median"}


def name(metric: str) -> str:
    """Return the name of a metric or a signal; of an unknown one, its key with spaces."""
    return METRICS[metric][0] if metric in METRICS else _OFFLINE.get(metric, metric.replace("_", " "))


def units(metric: str, less: bool) -> tuple[str, ...]:
    """Return the unit of a metric, and whether less is better, in a word or two each."""
    unit = METRICS.get(metric, ("", ""))[1]
    return (*((unit,) if unit else ()), *(("less is better",) if less else ()))


def titled(metric: str, less: bool) -> str:
    """Return the name of a metric, and whether less is better, as the title of a chart."""
    return f"{name(metric)} (less is better)" if less else name(metric)


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
