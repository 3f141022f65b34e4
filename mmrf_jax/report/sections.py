"""The inputs of a report and its sections, which `page` combines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmrf_jax.report import charts
from mmrf_jax.signals import Signals

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
      explained: from `training.run_report.explain_run`.
      measured: {"speed", "scale": from `mmrf benchmark`}, if available.
      starts: of the run and its resumptions, {"start", "host", "commit", "command"} each.
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
    starts: Sequence[Mapping[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """A section of the page: HTML `body` in which {{name}} stands for a chart; `missing` says why there is none."""

    identity: str
    title: str
    caption: str
    body: str = ""
    figures: Mapping[str, charts.Figure] = dataclasses.field(default_factory=dict)
    missing: str = ""


def grid(names: Sequence[str], kind: str = "") -> str:
    """Return the section's placeholders for these charts."""
    return f'<div class="charts {kind}">' + "".join("{{" + name + "}}" for name in names) + "</div>"


def split(table: str, charts: str) -> str:
    """Return a table and charts: next to each other on wide screens, else the charts first."""
    return f'<div class="split"><div class="figures">{charts}</div><div>{table}</div></div>'
