"""Report sections on machine performance, if `mmrf benchmark` has written its results into the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmrf_jax.report import charts, labels
from mmrf_jax.report.markup import table
from mmrf_jax.report.sections import Part, Run, grid


def speed(run: Run) -> Part | None:
    """Return rates next to their limits, from WORKDIR/speed.json; None if it does not exist."""
    found = run.measured.get("speed")
    if found is None:
        return None
    rows = [entry for entry in found["results"] if "limit" in entry]
    figures = {}
    if rows:
        shares = [(e["name"], e["fraction_of_limit"], f"{e['value']:,.0f} {e['unit']}") for e in rows]
        figures["speed-shares"] = charts.shares("share of the limit", shares)
    others = [[e["name"], f"{e['value']:,.2f} {e['unit']}"] for e in found["results"] if "limit" not in e]
    body = (grid(list(figures), "whole") if figures else "") + (table(["what", "measured"], others) if others else "")
    caption = (
        "Rates as shares of what the same machine could do, measured in the same run: gathering the candidates' "
        "features for policies that look at nothing else, sorting for GAUC, else the operations that the function must "
        f"do, at the rate of a large matrix product. {_machine(found)}"
    )
    return Part("speed", "How fast it is", caption, body, figures)


def scale(run: Run) -> Part | None:
    """Return the growth of costs and memory, from WORKDIR/scale.json; None if it does not exist."""
    found = run.measured.get("scale")
    if found is None:
        return None
    panels: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for entry in found["results"]:
        part, what, size = entry["name"].split("/")
        if size.isdigit():
            panels.setdefault((part, entry["unit"]), {}).setdefault(what, []).append((int(size), entry["value"]))
    figures = {
        f"scale-{part}-{unit}": charts.growth(part, curves, *labels.growth_axes(part, unit))
        for (part, unit), curves in panels.items()
    }
    caption = f"Costs and memory by the number of rows, videos, users, processes or log rows. {_machine(found)}"
    return Part("scale", "How it grows", caption, grid(list(figures), "wide"), figures)


def _machine(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    return f"{machine['cores']} cores, {', '.join(machine['devices'])}, jax {machine['jax']}."
