"""The inputs of a report and its sections, which `page` combines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmrf_jax.report import charts
from mmrf_jax.signals import SHORT_VIDEO, Signals

#: Why a results section is empty before the end of the run.
UNFINISHED = "The run has not come to its end: results.json is not there yet."


@dataclasses.dataclass(frozen=True)
class Run:
    """The inputs of a report page.

    Attributes:
      name: of the run.
      signals: of its feedback.
      config: nested.
      versions: {library: version}.
      rows: of metrics.jsonl.
      results: of results.json, empty if the run is not finished.
      source: counts from reading the input.
      explained: from `training.run_report.explain`.
      measured: {"speed", "scale": from `mmrf benchmark`}, if available.
    """

    name: str
    signals: Signals
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]
    source: Mapping[str, Any]
    explained: Mapping[str, Any]
    measured: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Part:
    """A section of the page: HTML `body` in which {{name}} stands for a chart; `missing` says why there is none."""

    identity: str
    title: str
    caption: str
    body: str = ""
    figures: Mapping[str, charts.Figure] = dataclasses.field(default_factory=dict)
    missing: str = ""


_LABELS = {
    "watch_time": "watch time, s a session",
    "depth": "depth, videos a session",
    "requests": "requests a session",
    "return_rate": "back within a day",
    "click": "clicks a video",
    "long_view": "long views a video",
    "like": "likes a video",
    "follow": "follows a video",
    "comment": "comments a video",
    "forward": "forwards a video",
    "hate": "hates a video",
    "profile_enter": "profiles entered a video",
    "coverage": "coverage of the catalogue",
    "gini": "Gini index of exposures",
    "ild": "diversity in a slate",
}


def label(signals: Signals, metric: str) -> str:
    """Return the words for a metric, with its unit."""
    if metric not in signals.names:
        return _LABELS.get(metric, metric.replace("_", " "))
    kind = signals.signals[signals.index(metric)].kind
    if metric in _LABELS and kind == SHORT_VIDEO.signals[SHORT_VIDEO.index(metric)].kind:
        return _LABELS[metric]
    unit = {"binary": "a video", "duration": "s a session", "count": "a session", "value": "total a session"}[kind]
    return f"{metric.replace('_', ' ')}, {unit}"


def grid(names: Sequence[str], kind: str = "") -> str:
    """Return the section's placeholders for these charts."""
    return f'<div class="charts {kind}">' + "".join("{{" + name + "}}" for name in names) + "</div>"
