"""What a report is made of, and its sections; `page` puts them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmrf_jax.report import charts

#: Why a section of results is empty before the end.
UNFINISHED = "The run has not come to its end: results.json is not there yet."


@dataclasses.dataclass(frozen=True)
class Run:
    """What a page is made of.

    Attributes:
      name: of the run. config: nested. versions: {library: version}. rows: of metrics.jsonl. results: of results.json,
      empty where the run is not finished. source: what was counted when the input was read.
      explained: of `training.run_report.explain`. measured: {"speed", "scale": of `launch.benchmark`}, if there.
    """

    name: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]
    source: Mapping[str, Any]
    explained: Mapping[str, Any]
    measured: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Part:
    """A section of the page: `body` is HTML, in which {{name}} stands for a chart; or why there is none."""

    identity: str
    title: str
    caption: str
    body: str = ""
    figures: Mapping[str, charts.Figure] = dataclasses.field(default_factory=dict)
    missing: str = ""


def grid(names: Sequence[str], kind: str = "") -> str:
    """A place in a section's body for each of these charts."""
    return f'<div class="charts {kind}">' + "".join("{{" + name + "}}" for name in names) + "</div>"
