"""Report section on training curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmrf_jax.report import charts, labels
from mmrf_jax.report.markup import escape, legend, table
from mmrf_jax.report.sections import Part, Run, grid
from mmrf_jax.signals import Signals

_PHASES = {"train": "agents", "fit": "feedback model"}


def curves(run: Run) -> Part:
    title, identity = "How it learned", "curves"
    rows = [row for row in run.rows if row["phase"] in _PHASES]
    if not rows:
        return Part(identity, title, "", missing="metrics.jsonl has no steps of learning.")
    phases = [phase for phase in _PHASES if any(row["phase"] == phase for row in rows)]
    ends = round_ends(run.rows)
    names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "seed", "phase", "seconds"))
    figures: dict[str, charts.Figure] = {}
    for name in names:
        series: dict[str, tuple[int, list, list, list]] = {}
        for phase in phases:
            if points := [(row["step"], row[name]) for row in rows if row["phase"] == phase and name in row]:
                steps, values = map(list, zip(*points, strict=True))
                series[_PHASES[phase]] = (list(_PHASES).index(phase), steps, values, ends)
        figures[name] = charts.curves(*titled(run.signals, name), series)
    body = legend([_PHASES[phase] for phase in phases]) + grouped(run.signals, figures, "curve")
    body += _exploitation_gap(run)
    caption = (
        "Steps count the whole run; a dotted line ends a round. Strong lines are moving means over a tenth of a round, "
        "pale ones the raw values, each of one batch, so rare signals are noisy. Losses should fall; after a round "
        "they may jump, because the logs are new. Objectives are in units of each critic's standard deviation, and "
        "fall where that grows faster."
    )
    return Part(identity, title, caption, body, {f"curve-{name}": figure for name, figure in figures.items()})


def round_ends(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the steps at which rounds of updates ended."""
    phases = [row["phase"] for row in rows]
    return [rows[i]["step"] for i in range(len(rows) - 1) if phases[i] == "train" and phases[i + 1] != "train"]


def grouped(signals: Signals, names: Iterable[str], prefix: str) -> str:
    """Return the placeholders `PREFIX-NAME` of the curves of logged metrics, by what they are."""
    groups: dict[str, list[str]] = {"loss": [], "objective": [], "": []}
    order = {signal: place for place, signal in enumerate(signals.names)}
    for name in sorted(names, key=lambda name: order.get(name.partition("/")[2], len(order))):
        first, _, last = name.partition("/")
        known = first == "objective" or (first == "loss" and last in (*signals.names, "continuation"))
        groups[first if known else ""].append(f"{prefix}-{name}")
    body = ""
    if groups["loss"]:
        body += "<h3>Loss of predicted feedback and of continuing the session</h3>" + grid(groups["loss"], "curves")
    if groups["objective"]:
        body += "<h3>Objective of each agent's actor</h3>" + grid(groups["objective"], "curves")
    if groups[""]:
        more = grid(groups[""], "curves")
        body += f"<details><summary>Everything else that was logged</summary>{more}</details>"
    return body


def titled(signals: Signals, name: str) -> tuple[str, str]:
    """Return the title and the unit of a logged metric's chart."""
    first, _, last = name.partition("/")
    if first == "loss" and last in signals.binary_names:
        return labels.name(last), "log-loss, nats"
    if first == "loss":
        return ("continuing the session", "log-loss, nats") if last == "continuation" else (labels.name(last), "loss")
    if first == "objective":
        return labels.name(last), "standard deviations"
    return name.replace("/", " ").replace("_", " "), first.replace("_", " ")


def _exploitation_gap(run: Run) -> str:
    """Return the table of each round's policy return in its own model and in the world."""
    rows = [row for row in run.rows if row["phase"] == "model_exploitation_gap"]
    if not rows:
        return ""
    cells = [
        [str(i), f"{row['model']:,.0f}", f"{row['world']:,.0f}", labels.show(row["gap"], "+,.0f")]
        for i, row in enumerate(rows, 1)
    ]
    head = ["after round", "in its model", "in the world", "gap"]
    main = ", ".join((labels.name(run.signals.main), *labels.units(run.signals, run.signals.main)))
    return f"<h3>Return of the newest policy: {escape(main)}</h3>" + table(head, cells)
