"""Report section on training curves."""

from __future__ import annotations

from mmrf_jax import types
from mmrf_jax.report import charts, labels
from mmrf_jax.report.markup import legend, table
from mmrf_jax.report.sections import Part, Run, grid

_PHASES = {"train": "agents", "fit": "feedback model"}


def curves(run: Run) -> Part:
    title, identity = "How it learned", "curves"
    rows = [row for row in run.rows if row["phase"] in _PHASES]
    if not rows:
        return Part(identity, title, "", missing="metrics.jsonl has no steps of learning.")
    phases = [phase for phase in _PHASES if any(row["phase"] == phase for row in rows)]
    order = [row["phase"] for row in run.rows]
    ends = [run.rows[i]["step"] for i in range(len(order) - 1) if order[i] == "train" and order[i + 1] != "train"]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "seed", "phase", "seconds"))
    figures: dict[str, charts.Figure] = {}
    groups: dict[str, list[str]] = {"losses": [], "objectives": [], "rest": []}
    for name in names:
        series: dict[str, tuple[int, list, list]] = {}
        for phase in phases:
            points = [(row["step"], row[name]) for row in rows if row["phase"] == phase and name in row]
            if points:
                steps, values = map(list, zip(*points, strict=True))
                series[_PHASES[phase]] = (list(_PHASES).index(phase), steps, values)
        first, _, last = name.partition("/")
        group = "losses" if last in (*types.SIGNALS, "stay") and first == "loss" else "rest"
        group = "objectives" if first == "objective" else group
        groups[group].append(f"curve-{name}")
        chart, unit = titled(name)
        figures[f"curve-{name}"] = charts.curves(chart, series, ends, unit)
    body = legend([_PHASES[phase] for phase in phases])
    body += "<h3>Loss of predicted feedback and of continuing the session</h3>" + grid(groups["losses"], "curves")
    if groups["objectives"]:
        body += "<h3>Objective of each agent's actor</h3>" + grid(groups["objectives"], "curves")
    if groups["rest"]:
        more = grid(groups["rest"], "curves")
        body += f"<details><summary>Everything else that was logged</summary>{more}</details>"
    body += _exploitation_gap(run)
    caption = (
        "Steps count the whole run; a dotted line ends a round. Strong lines are moving means over a tenth of a round, "
        "pale ones the raw values, each of one batch, so rare signals are noisy. Losses should fall; after a round "
        "they may jump, because the logs are new. Objectives are in units of each critic's standard deviation, and "
        "fall where that grows faster."
    )
    return Part(identity, title, caption, body, figures)


def titled(name: str) -> tuple[str, str]:
    """Return the title and the unit of a logged metric's chart."""
    first, _, last = name.partition("/")
    if first == "loss" and last in types.BINARY_SIGNALS:
        return labels.name(last), "log-loss, nats"
    if first == "loss":
        return ("continuing the session", "log-loss, nats") if last == "stay" else (labels.name(last), "loss")
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
    return "<h3>Return of the newest policy, seconds of watch time per session</h3>" + table(head, cells)
