"""Report sections on the agents: inter-agent attention, gradient conflict, the session explorer, and the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmrf_jax.report import charts, labels
from mmrf_jax.report.markup import Cell, data, escape, flat, plain, table
from mmrf_jax.report.sections import Part, Run, grid


def _agents(run: Run) -> list[str]:
    return [labels.name(agent) for agent in run.explained["sessions"]["agents"]]


def attention(run: Run) -> Part:
    found, title = run.explained["attention"], "Attention between agents"
    if "missing" in found:
        return Part("attention", title, "", missing=found["missing"])
    agents = _agents(run)
    values = [[None if i == j else x for j, x in enumerate(row)] for i, row in enumerate(found["matrix"])]
    shares = [x for row in values for x in row if x is not None]
    axes = "agent that is attended to", "attending agent"
    figure = charts.heat("share of attention", agents, agents, values, min(shares), max(shares), axes)
    caption = (
        "A row sums to 1: how an agent shares its attention among the others, on average over "
        f"{found['requests']:,} held-out requests and all heads. Even shares would be {1 / (len(agents) - 1):.2f}; "
        "look for columns that are dark throughout, agents that all others listen to. The last row is the main "
        "agent's."
    )
    return Part("attention", title, caption, grid(["attention-map"], "pair"), {"attention-map": figure})


def conflict(run: Run) -> Part:
    title, agents = "Conflict of gradients", _agents(run)
    figures, notes = {}, ""
    for name, label in (("actors", "actors: maps of the attention"), ("encoder", "critics: the shared encoder")):
        found = run.explained[name]
        if "missing" in found:
            notes += f'<p class="missing">{escape(found["missing"])}</p>'
            continue
        rows, values = list(agents), [*found["matrix"]]
        if found["itself"] is not None:
            rows, values = [*rows, "itself, other half"], [*values, found["itself"]]
        figures[f"conflict-{name}"] = charts.heat(label, rows, agents, values, -1.0, 1.0, ("agent", "agent"))
    if not figures:
        return Part("conflict", title, "", missing=run.explained["actors"]["missing"])
    requests = run.explained["encoder"]["requests"]
    caption = (
        f"Cosines between what two agents want of the same parameters, over {requests:,} held-out requests: blue, "
        "they pull the same way; orange, against each other. The actors by their policy objectives, on the query, "
        "key and value maps of the attention (the rest of an actor is its own); the critics by the losses of "
        "each agent's own feedback, on the encoder. The last row is an agent with itself on the other half of the "
        "requests: where that is small, its column is chance."
    )
    return Part("conflict", title, caption, notes + grid(list(figures), "pair"), figures)


def explorer(run: Run) -> Part:
    found = run.explained["sessions"]
    if not found["users"]:
        return Part("explorer", "Session explorer", "", missing="There is no session to look at.")
    whose = (
        "Users of the A/B test, served by this run's ranker: what it shows are the main agent's best."
        if found["served"]
        else "The longest sessions of the held-out log, as they were logged: another ranker chose what was shown. "
        "Users and videos have the numbers of the prepared log."
    )
    names = _agents(run)
    caption = (
        f"{whose} Listed are the videos that were shown, with what the user did, then others that the agent of "
        f"{names[-1]} or another one ranks high. Scores are compared within a column only; no. is the place among "
        "all candidates, and a frame marks those that the agent alone would have shown."
    )
    for agent, name in zip(found["agents"], names, strict=True):
        if agent in run.signals.names and run.signals.sign(agent) < 0:
            caption += f" The agent of {name} ranks high what it expects to get none."
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = f"""<div class="controls"><label>User <select id="user"></select></label>
<div><label id="requests-label">Request</label>
<div id="requests" role="group" aria-labelledby="requests-label"></div></div></div>
<p id="session" aria-live="polite"></p>
<div class="scroll" tabindex="0" role="region" aria-label="candidates"><table id="candidates">
<thead><tr><th scope="col">shown</th><th scope="col" class="text">what the user did</th>{heads}</tr></thead>
<tbody></tbody></table></div>
{data("explorer-data", {"users": found["users"]})}"""
    return Part("explorer", "Session explorer", caption, body)


def settings(run: Run) -> Part:
    body, time = _starts(run), ""
    spent = next((row for row in reversed(run.rows) if row["phase"] == "time"), None)
    if spent:
        seconds = {name.removeprefix("seconds_"): x for name, x in spent.items() if name.startswith("seconds_")}
        rows = [[name, f"{x:,.1f}", f"{x / (sum(seconds.values()) or 1):.0%}"] for name, x in seconds.items()]
        time = f"<div><h3>Time of the last start</h3>{table(['phase', 'seconds', 'share'], rows)}</div>"
    versions = table(["library", "version"], run.versions.items())
    body += f'<div class="tables">{time}<div><h3>Versions that wrote this page</h3>{versions}</div></div>'
    body += _details("Config", run.config)
    if run.source:
        body += _details("Input, as counted", run.source)
    return Part("settings", "What was run", "The command at the commit, with this config, gives the same run.", body)


def _starts(run: Run) -> str:
    """Return the table of the run's starts: the first, and one per resumption."""
    if not run.starts:
        return '<p class="missing">This run was started before its folder recorded commits and commands.</p>'
    rows: list[list[str | Cell]] = [
        [start["start"], start["host"], start["commit"], Cell(start["command"], kind="text wrap")]
        for start in run.starts
    ]
    return table(["start", "host", "commit", Cell("command", kind="text")], rows)


def _details(title: str, tree: Mapping[str, Any]) -> str:
    lines = table(["field", Cell("value", kind="text")], _lines(tree))
    return f"<details><summary>{title}</summary>{lines}</details>"


def _lines(tree: Mapping[str, Any]) -> list[list[str | Cell]]:
    return [[name, Cell(plain(value), kind="text wrap")] for name, value in flat(tree)]
