"""HTML building blocks of a page: all text is escaped on entry, so names and settings may contain anything."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmrf_jax.abtest import statistics
from mmrf_jax.report import palette
from mmrf_jax.report.labels import show

NOTHING = "–"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table cell: a value, and lines of small print under it.

    Attributes:
      outcome: "better" or "worse" if the interval in the small print excludes "no difference"; the cell is then bold
        and in that colour, and its last line says the word.
    """

    text: str
    detail: str | tuple[str, ...] = ""
    outcome: str = ""
    kind: str = ""


def escape(text: Any) -> str:
    return html.escape(str(text), quote=True)


def prose(text: str) -> str:
    """Escape a sentence; no line ends before "%" or within an interval."""
    return re.sub(r"\[([^][\s]+), ([^][\s]+)\]", r"[\1,&nbsp;\2]", escape(text).replace(" %", "&nbsp;%"))


def number(x: float | None, digits: int = 4) -> str:
    """Format a number with `digits` significant digits."""
    if x is None:
        return NOTHING
    return show(x, ",.0f" if abs(x) >= 10 ** (digits - 1) else f".{digits}g")


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by dotted name."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def plain(value: Any) -> str:
    """Format a setting."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def interval(bounds: Sequence[float | None] | None, form: str = ".4f") -> str:
    """Format an interval; "" if there is none."""
    known = [x for x in bounds or () if x is not None and math.isfinite(x)]
    return f"[{', '.join(show(x, form) for x in known)}]" if len(known) == 2 else ""


def change(text: str, diff: float | None, bounds: Sequence[float] | None, form: str, less: bool = False) -> Cell:
    """Return a cell of a value with a difference, its interval, and "better" or "worse" if that excludes 0.

    Args:
      text: the value.
      diff: the difference; None leaves it out.
      bounds: its interval.
      form: format of both, which may end in " %".
      less: whether less is better.
    """
    form, unit = (form.removesuffix(" %"), " %") if form.endswith(" %") else (form, "")
    shown = interval(bounds, form)
    outcome = statistics.verdict(bounds, less) if shown else ""
    first = "" if diff is None else f"{show(diff, form)}{unit}"
    return Cell(text, tuple(filter(None, [f"{first} {outcome}".strip(), shown])), outcome)


def table(head: Sequence[str | Cell], rows: Iterable[Sequence[str | Cell]]) -> str:
    """Return a table in its own box, which scrolls if the table is wider than the page."""
    names = [name if isinstance(name, Cell) else Cell(name) for name in head]
    lines = ["<tr>" + "".join(f'<th scope="col" class="{x.kind}">{escape(x.text)}</th>' for x in names) + "</tr>"]
    body = []
    for row in rows:
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
        body.append("<tr>" + "".join(_cell(cell) for cell in cells) + "</tr>")
    box = '<div class="scroll" tabindex="0" role="region" aria-label="table">'
    return f"{box}<table><thead>{''.join(lines)}</thead><tbody>{''.join(body)}</tbody></table></div>"


def _cell(cell: Cell) -> str:
    names = " ".join(filter(None, [cell.outcome, cell.kind]))
    kind = f' class="{escape(names)}"' if names else ""
    lines = (cell.detail,) if isinstance(cell.detail, str) else cell.detail
    detail = "".join(f"<small>{escape(line)}</small>" for line in lines if line)
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
        look = palette.style(index)
        line = f'<path d="M1 7H37" stroke-width="2" stroke-dasharray="{_STROKES[look["dash"]]}"/>'
        colour = f"var(--series-{palette.COLOURS.index(look['colour'])})"
        glyph = f'<svg aria-hidden="true" style="stroke:{colour};fill:{colour}">'
        items.append(f"<li>{glyph}{line}{_SHAPES[look['marker']]}</svg>{escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def data(identity: str, value: Any) -> str:
    """Embed JSON for scripts; no text in it can close the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{identity}">{text}</script>'
