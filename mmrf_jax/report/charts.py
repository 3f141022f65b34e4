"""Charts of a report, as Bokeh figures: as wide as their column, with series that differ in more than colour."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.core.properties import value
from bokeh.models import BasicTickFormatter, ColumnDataSource, HoverTool, NumeralTickFormatter
from bokeh.models.annotations import Span, TeeHead, Title, Whisker
from bokeh.palettes import Blues256
from bokeh.plotting import figure

from mmrf_jax.abtest import statistics
from mmrf_jax.report.labels import show
from mmrf_jax.report.palette import AXIS, COLOURS, DIRECTIONS, GRID, INK, PAPER, style

_CELL_INK = "#1f2934"  # dark on light cells of a heat map, on a dark page too
_FONT = "system-ui, sans-serif"
_POINTS = 120  # maximum per smoothed curve: more are averaged
_RAW_POINTS = 400  # maximum of the raw curve behind it

Figure = Any  # Bokeh's figures have no useful types


def _blank(title: str, height: int, x: str = "", y: str = "", **options) -> Figure:
    """Return an empty chart; `x` and `y` are the labels of its axes, with units."""
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        tools="",
        toolbar_location=None,
        min_border=2,
        outline_line_color=None,
        background_fill_color=None,
        border_fill_color=None,
        **options,
    )
    plot.title = Title(text=title, text_font=_FONT, text_font_size="12px", text_color=INK)
    plot.grid.grid_line_color = GRID
    plot.xaxis.axis_label, plot.yaxis.axis_label = x or None, y or None
    for axis in plot.axis:
        axis.update(
            axis_line_color=AXIS,
            major_tick_line_color=AXIS,
            minor_tick_line_color=None,
            major_label_text_font=_FONT,
            major_label_text_font_size="11px",
            major_label_text_color=INK,
            axis_label_text_font=_FONT,
            axis_label_text_font_size="11px",
            axis_label_text_font_style="normal",
            axis_label_text_color=INK,
        )
    return plot


def _hover(plot: Figure, renderers: list, tips: list[tuple[str, str]]) -> None:
    plot.add_tools(HoverTool(renderers=renderers, tooltips=tips))


def pieces(x: Sequence[float], y: Sequence[float], breaks: Sequence[float]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split a curve at its breaks; a point at a break belongs to the piece before it."""
    at, values = np.asarray(x, float), np.asarray(y, float)
    found = [(at > low) & (at <= high) for low, high in itertools.pairwise([-math.inf, *breaks, math.inf])]
    return [(at[mask], values[mask]) for mask in found if mask.any()]


def thinned(
    x: Sequence[float], y: Sequence[float], breaks: Sequence[float], points: int = _POINTS
) -> tuple[list[float], list[float]]:
    """Downsample a curve to about `points`, by means of neighbours, with a gap (NaN) at every break."""
    size = max(-(-len(x) // points), 1)
    out: tuple[list[float], list[float]] = ([], [])
    for piece in pieces(x, y, breaks):
        for column, values in zip(out, piece, strict=True):
            means = (values[start : start + size].mean() for start in range(0, len(values), size))
            column += [float(f"{mean:.6g}") for mean in means]  # more digits would only make the page larger
            column.append(math.nan)
    return out[0][:-1], out[1][:-1]


def smoothed(x: Sequence[float], y: Sequence[float], breaks: Sequence[float]) -> list[float]:
    """Return the centred moving mean of a curve, over a tenth of each piece between breaks, in the order of x."""
    out: list[float] = []
    for _, values in pieces(x, y, breaks):
        reach = len(values) // 20
        total = np.concatenate([[0.0], np.cumsum(values)])
        index = np.arange(len(values))
        low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
        out += ((total[high] - total[low]) / (high - low)).tolist()
    return out


def curves(
    title: str,
    unit: str,
    series: Mapping[str, tuple[int, list, list, Sequence[float]]],
    raw: bool = True,
) -> Figure:
    """Plot smoothed curves over steps, the raw ones behind them.

    Args:
      title: of the chart.
      unit: of the values.
      series: {name: (style number, steps, values, ends of rounds)}, by rising steps. A curve has a gap at the end of a
        round, and the chart a dotted line if all curves share it.
      raw: whether to draw the raw curves.
    """
    plot = _blank(title, 210, "step", unit)
    plot.xaxis.ticker.desired_num_ticks, plot.yaxis.ticker.desired_num_ticks = 3, 4
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.xgrid.grid_line_color = None
    for at in set.intersection(*(set(ends) for *_, ends in series.values())):
        plot.add_layout(Span(location=at, dimension="height", line_color=AXIS, line_dash="dotted"))
    # One renderer for all series: Bokeh takes milliseconds for each.
    lines: dict[str, list] = {key: [] for key in ("x", "y", "colour", "dash", "name")}
    behind: dict[str, list] = {key: [] for key in ("x", "y", "colour")}
    points: dict[str, list] = {key: [] for key in ("x", "y", "colour", "marker")}
    for name, (number, steps, values, breaks) in series.items():
        look = style(number)
        if raw:
            _append(behind, *thinned(steps, values, breaks, _RAW_POINTS), look["colour"])
        x, y = thinned(steps, smoothed(steps, values, breaks), breaks)
        _append(lines, x, y, look["colour"], look["dash"], name)
        every = max(len(x) // 6, 1)
        for at, height in zip(x[::every], y[::every], strict=True):
            _append(points, at, height, look["colour"], look["marker"])
    if raw:
        plot.multi_line("x", "y", source=ColumnDataSource(behind), line_color="colour", line_alpha=0.3, line_width=1)
    data = ColumnDataSource(lines)
    drawn = plot.multi_line("x", "y", source=data, line_color="colour", line_dash="dash", line_width=2)
    dots = ColumnDataSource(points)
    plot.scatter("x", "y", source=dots, marker="marker", size=6, line_color="colour", fill_color="colour")
    _hover(plot, [drawn], [("", "@name"), ("step", "$snap_x{0,0}"), ("smoothed", "$snap_y{0.[0000]}")])
    return plot


def _append(columns: Mapping[str, list], *row: Any) -> None:
    for column, cell in zip(columns.values(), row, strict=True):
        column.append(cell)


def forest(title: str, rows: Sequence[tuple[str, float, float, float]], control: str, less: bool = False) -> Figure:
    """Plot differences to the control with their intervals (name, difference, low, high), in %, the first on top.

    Better and worse differ in colour and marker; a point whose interval contains 0 is hollow.

    Args:
      title: of the chart.
      rows: one per arm.
      control: what the differences are to.
      less: whether less is better.
    """
    names = [row[0] for row in rows]
    plot = _blank(title, 84 + 34 * len(rows), f"difference to {control}, %", y_range=names[::-1])
    plot.ygrid.grid_line_color = None
    plot.xaxis.ticker.desired_num_ticks = 4
    plot.add_layout(Span(location=0, dimension="height", line_color=INK, line_dash="dashed", level="underlay"))
    columns = dict(zip(("name", "diff", "low", "high"), map(list, zip(*rows, strict=True)), strict=True))
    columns["text"] = [f"{show(diff, '+.1f')} %" for diff in columns["diff"]]
    outcomes = [statistics.verdict(bounds, less) for bounds in zip(columns["low"], columns["high"], strict=True)]
    columns["colour"], columns["marker"] = map(list, zip(*(DIRECTIONS[outcome] for outcome in outcomes), strict=True))
    columns["filled"] = [1.0 if outcome else 0.0 for outcome in outcomes]
    data = ColumnDataSource(columns)
    plot.segment("low", "name", "high", "name", source=data, line_color="colour", line_width=2.5)
    points = plot.scatter(
        "diff",
        "name",
        source=data,
        marker="marker",
        size=10,
        line_color="colour",
        fill_color="colour",
        fill_alpha="filled",
        line_width=2,
    )
    _texts(plot, "diff", "name", data, y_offset=-8, text_align="center", text_baseline="bottom")
    low, high = min([0.0, *columns["low"]]), max([0.0, *columns["high"]])
    margin = 0.3 * (high - low or 1.0)
    plot.x_range.start, plot.x_range.end = low - margin, high + margin
    _hover(
        plot, [points], [("", "@name"), ("difference", "@text"), ("from", "@low{+0.00} %"), ("to", "@high{+0.00} %")]
    )
    return plot


def ranked(
    title: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[tuple[str, float]]],
    intervals: Sequence[tuple[str, float, float]],
) -> Figure:
    """Plot shares of pairs in the right order by signal, the first signal on top, with a line at chance.

    Args:
      title: of the chart.
      names: of the signals.
      series: {ranker: [(signal, share)]}.
      intervals: (signal, low, high) of the first ranker.
    """
    plot = _blank(title, 84 + 30 * len(names), "pairs ranked right", y_range=list(names)[::-1])
    plot.ygrid.grid_line_color = None
    plot.xaxis.ticker.desired_num_ticks = 5
    plot.add_layout(Span(location=0.5, dimension="height", line_color=INK, line_dash="dashed", level="underlay"))
    if intervals:
        name, low, high = map(list, zip(*intervals, strict=True))
        plot.segment(low, name, high, name, line_color=style(0)["colour"], line_width=2.5)
    drawn = []
    for number, (ranker, points) in reversed(list(enumerate(series.items()))):  # the first above the others
        look = style(number)
        name, share = map(list, zip(*points, strict=True)) if points else ([], [])
        data = ColumnDataSource({"name": name, "share": share, "ranker": [ranker] * len(name)})
        drawn.append(plot.scatter("share", "name", source=data, marker=look["marker"], size=8, color=look["colour"]))
    ends = [
        0.5,
        *(x for points in series.values() for _, x in points),
        *(x for _, *bounds in intervals for x in bounds),
    ]
    margin = 0.05 * (max(ends) - min(ends) or 1.0)
    plot.x_range.start, plot.x_range.end = min(ends) - margin, max(ends) + margin
    _hover(plot, drawn, [("", "@ranker"), ("", "@name"), ("share", "@share{0.0000}")])
    return plot


def _texts(plot: Figure, x: str, y: str, data: ColumnDataSource, **options) -> None:
    look = {"text_font": value(_FONT), "text_font_size": "11px", "text_color": INK, "background_fill_color": PAPER}
    plot.text(x, y, "text", source=data, **look, **options)


def shares(title: str, rows: Sequence[tuple[str, float, str]]) -> Figure:
    """Plot shares of a limit (name, share, label) on a logarithmic axis, the limit a line at 1, the first on top.

    Dots, not bars: a logarithmic axis has no 0 that a bar could start from.
    """
    names = [row[0] for row in rows]
    low, high = min(0.1, *(row[1] for row in rows)), max(1.0, *(row[1] for row in rows))
    label = "share of the limit of this machine (1: as fast as it could be)"
    plot = _blank(
        title, 90 + 26 * len(rows), label, y_range=names[::-1], x_axis_type="log", x_range=(0.5 * low, 30.0 * high)
    )
    plot.add_layout(Span(location=1.0, dimension="height", line_color=INK, line_dash="dashed", level="underlay"))
    columns = dict(zip(("name", "share", "text"), map(list, zip(*rows, strict=True)), strict=True))
    data = ColumnDataSource(columns)
    dots = plot.scatter("share", "name", source=data, marker="circle", size=9, color=COLOURS[0])
    _texts(plot, "share", "name", data, x_offset=9, text_baseline="middle")
    _hover(plot, [dots], [("", "@name"), ("measured", "@text"), ("share of the limit", "@share{0.00}")])
    return plot


def growth(title: str, series: Mapping[str, Sequence[tuple[int, float]]], size: str, unit: str) -> Figure:
    """Plot costs (size, cost) over size, on a logarithmic axis.

    Args:
      title: of the chart.
      series: {name: [(size, cost)]}.
      size: what the size counts.
      unit: of the costs.
    """
    plot = _blank(title, 260, size, unit, x_axis_type="log")
    for index, (name, points) in enumerate(series.items()):
        look = style(index)
        x, y = map(list, zip(*points, strict=True))
        data = ColumnDataSource({"x": x, "y": y})
        plot.line("x", "y", source=data, color=look["colour"], line_dash=look["dash"], line_width=2, legend_label=name)
        dots = plot.scatter(
            "x", "y", source=data, marker=look["marker"], size=8, color=look["colour"], legend_label=name
        )
        _hover(plot, [dots], [("", name), ("size", "@x{0,0}"), ("cost", "@y{0.000}")])
    plot.y_range.start = 0.0
    plot.y_range.end = 1.3 * max(cost for points in series.values() for _, cost in points)
    plot.legend.update(
        location="bottom_right",
        label_text_font=_FONT,
        label_text_font_size="11px",
        label_text_color=INK,
        background_fill_alpha=0.0,
        border_line_color=None,
    )
    return plot


def reliability(
    title: str, series: Mapping[str, tuple[int, list[Mapping[str, float]]]], unit: str, share: bool
) -> Figure:
    """Plot observed against predicted means by decile (reliability diagram); on the diagonal they agree.

    Args:
      series: {name: (style number, [{"predicted", "actual", "rows"}])}.
      unit: of the means.
      share: whether means are of 0 and 1, so that the first series has 95 % intervals.
    """
    plot = _blank(title, 240, f"predicted, {unit}", f"observed, {unit}")
    plot.xaxis.ticker.desired_num_ticks = plot.yaxis.ticker.desired_num_ticks = 3
    plot.axis.formatter = BasicTickFormatter(use_scientific=False)
    drawn, top = [], 1e-9
    for place, (name, (number, bins)) in enumerate(series.items()):
        look = style(number)
        x, y, rows = ([b[key] for b in bins] for key in ("predicted", "actual", "rows"))
        data = ColumnDataSource({"x": x, "y": y, "rows": rows, "name": [name] * len(x)})
        if share and place == 0:
            bounds = [wilson(share_of, n) for share_of, n in zip(y, rows, strict=True)]
            spread = ColumnDataSource({"x": x, "low": [b[0] for b in bounds], "high": [b[1] for b in bounds]})
            colour, whisker = look["colour"], Whisker(base="x", lower="low", upper="high", source=spread)
            whisker.line_color = colour
            whisker.lower_head, whisker.upper_head = (TeeHead(size=8, line_color=colour) for _ in range(2))
            plot.add_layout(whisker)
            top = max([top, *(b[1] for b in bounds)])
        plot.line("x", "y", source=data, line_color=look["colour"], line_dash=look["dash"])
        drawn.append(plot.scatter("x", "y", source=data, marker=look["marker"], size=7, color=look["colour"]))
        top = max([top, *x, *y])
    plot.line([0, top], [0, top], line_color="#7b8794", line_dash="dashed")
    plot.x_range.start = plot.y_range.start = 0
    plot.x_range.end = plot.y_range.end = 1.05 * top
    tips = [("", "@name"), ("predicted", "@x{0.[0000]}"), ("observed", "@y{0.[0000]}"), ("videos", "@rows{0,0}")]
    _hover(plot, drawn, tips)
    return plot


def wilson(share: float, rows: float, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval of a share of `rows` independent exposures."""
    centre, scale = share + z * z / (2 * rows), 1 + z * z / rows
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    low: float,
    high: float,
    axes: tuple[str, str] = ("", ""),
) -> Figure:
    """Plot a matrix as a heat map with numbers in the cells, rows from the top; None stays blank.

    Args:
      low: value at the lower end of the colour scale: light blue, or dark orange if it is below 0.
      high: value at the upper end: dark blue.
      axes: labels below and on the left.
    """
    plot = _blank(title, 110 + 34 * len(rows), *axes, x_range=list(columns), y_range=list(rows)[::-1])
    plot.grid.grid_line_color = None
    for axis in plot.axis:
        axis.update(major_tick_line_color=None, axis_line_color=None)
    plot.xaxis.major_label_orientation = 0.9
    every = ((r, c, values[i][j]) for i, r in enumerate(rows) for j, c in enumerate(columns))
    cells = [(r, c, x) for r, c, x in every if x is not None]
    data = ColumnDataSource(
        {
            "row": [r for r, _, _ in cells],
            "column": [c for _, c, _ in cells],
            "value": [x for _, _, x in cells],
            "text": [show(x, ".2f") for _, _, x in cells],
            "fill": [_shade(x, low, high)[0] for _, _, x in cells],
            "ink": [_shade(x, low, high)[1] for _, _, x in cells],
        }
    )
    drawn = plot.rect("column", "row", 0.96, 0.94, source=data, fill_color="fill", line_color=None)
    plot.text(
        "column",
        "row",
        "text",
        source=data,
        text_align="center",
        text_baseline="middle",
        text_color="ink",
        text_font=value(_FONT),
        text_font_size="11px",
    )
    _hover(plot, [drawn], [("", "@row, @column"), ("value", "@value{0.000}")])
    return plot


_ORANGES = ("#fff3e0", "#fddcb5", "#f7bd84", "#ee9a55", "#d9752b", "#b35806", "#8a4200")


def _shade(x: float, low: float, high: float) -> tuple[str, str]:
    """Return the colour of a cell, and of the number in it."""
    if low < 0 and x < 0:
        size = min(x / low, 1.0)
        fill = _ORANGES[round(size * (len(_ORANGES) - 1))]
    else:
        start = max(low, 0.0)
        size = min(max((x - start) / (high - start or 1.0), 0.0), 1.0)
        fill = Blues256[250 - round(size * 220)]
    return fill, "#ffffff" if size > 0.6 else _CELL_INK
