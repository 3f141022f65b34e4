"""Report section on training curves."""

from __future__ import annotations

from mmrf_jax.report import charts
from mmrf_jax.report.markup import escape, legend, table
from mmrf_jax.report.sections import Part, Run, grid, label

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
        group = "losses" if last in (*run.signals.names, "stay") and first == "loss" else "rest"
        group = "objectives" if first == "objective" else group
        label = last if group != "rest" else name.replace("/", " ").replace("_", " ")
        groups[group].append(f"curve-{name}")
        figures[f"curve-{name}"] = charts.curves(label, series, ends)
    body = legend([_PHASES[phase] for phase in phases])
    body += "<h3>Loss of predicted feedback, and of staying</h3>" + grid(groups["losses"])
    if groups["objectives"]:
        body += "<h3>What each agent's actor ascends</h3>" + grid(groups["objectives"])
    if groups["rest"]:
        body += f"<details><summary>Everything else that was logged</summary>{grid(groups['rest'])}</details>"
    body += _exploitation_gap(run)
    caption = (
        "Against the steps of the whole run; a dotted line ends a round. Losses should fall; after a round they "
        "may jump, as the logs are new. Objectives are in units of each critic's spread, and fall where that "
        "grows faster. A point is a batch or the mean of a few, so rare signals are noisy."
    )
    return Part(identity, title, caption, body, figures)


def _exploitation_gap(run: Run) -> str:
    """Return the table of each round's policy return in its own model and in the world."""
    rows = [row for row in run.rows if row["phase"] == "model_exploitation_gap"]
    if not rows:
        return ""
    cells = [
        [str(i), f"{row['model']:,.0f}", f"{row['world']:,.0f}", charts.show(row["gap"], "+,.0f")]
        for i, row in enumerate(rows, 1)
    ]
    head = ["after round", "in its model", "in the world", "gap"]
    return f"<h3>What the newest policy earns, {escape(label(run.signals, run.signals.main))}</h3>" + table(head, cells)
