"""HTML building blocks of a page: all text is escaped on entry, so names and settings may contain anything."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from mmrf_jax.abtest import statistics
from mmrf_jax.report import charts

NOTHING = "–"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table cell: a value, and its interval in small print.

    Attributes:
      sure: whether the interval excludes "no difference"; if so, the cell is bold and `detail` says better or worse.
    """

    text: str
    detail: str = ""
    sure: bool = False
    kind: str = ""


def escape(text: Any) -> str:
    return html.escape(str(text), quote=True)


def number(x: float | None, digits: int = 4) -> str:
    """Format a number with `digits` significant digits."""
    if x is None:
        return NOTHING
    return charts.show(x, ",.0f" if abs(x) >= 10 ** (digits - 1) else f".{digits}g")


def interval(bounds: Sequence[float] | None, form: str = ".4f") -> str:
    return "" if bounds is None or None in bounds else "[" + ", ".join(charts.show(x, form) for x in bounds) + "]"


def significance(bounds: Sequence[float] | None, form: str, less: bool = False) -> tuple[str, bool]:
    """Format the interval of a difference, with "better" or "worse" if it excludes 0, and return whether it does.

    Args:
      less: whether less is better.
    """
    said = statistics.verdict(bounds, less)
    return " ".join(filter(None, [interval(bounds, form), said])), bool(said)


def table(head: Sequence[str], rows: Iterable[Sequence[str | Cell]]) -> str:
    """Return a table in its own box, which scrolls if the table is wider than the page."""
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(name)}</th>' for name in head) + "</tr>"]
    body = []
    for row in rows:
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
        body.append("<tr>" + "".join(_cell(cell) for cell in cells) + "</tr>")
    box = '<div class="scroll" tabindex="0" role="region" aria-label="table">'
    return f"{box}<table><thead>{''.join(lines)}</thead><tbody>{''.join(body)}</tbody></table></div>"


def _cell(cell: Cell) -> str:
    names = " ".join(filter(None, ["sure" if cell.sure else "", cell.kind]))
    kind = f' class="{escape(names)}"' if names else ""
    detail = f"<small>{escape(cell.detail)}</small>" if cell.detail else ""
    return f"<td{kind}>{escape(cell.text)}{detail}</td>"


_SHAPES = {
    "circle": '<circle cx="19" cy="7" r="4"/>',
    "square": '<rect x="15" y="3" width="8" height="8"/>',
    "triangle": '<path d="M19 2 24 11 14 11Z"/>',
    "diamond": '<path d="M19 2 24 7 19 12 14 7Z"/>',
    "inverted_triangle": '<path d="M19 12 24 3 14 3Z"/>',
    "hex": '<path d="M15 4 19 2 23 4 23 10 19 12 15 10Z"/>',
    "star": '<path d="M19 1 21 6 25 7 21 8 19 13 17 8 13 7 17 6Z"/>',
}
_STROKES = {"solid": "", "dashed": "6 3", "dotdash": "2 2 6 2", "dotted": "2 3"}


def legend(names: Sequence[str]) -> str:
    """Return one legend for many charts: the marker, dash and colour of each series."""
    items = []
    for index, name in enumerate(names):
        look = charts.style(index)
        line = f'<path d="M1 7H37" stroke-width="2" stroke-dasharray="{_STROKES[look["dash"]]}"/>'
        glyph = f'<svg aria-hidden="true" stroke="{look["colour"]}" fill="{look["colour"]}">'
        items.append(f"<li>{glyph}{line}{_SHAPES[look['marker']]}</svg>{escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def data(identity: str, value: Any) -> str:
    """Embed JSON for scripts; no text in it can close the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{identity}">{text}</script>'
