"""Plots of results, as PNG files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmrf_jax.abtest import statistics, summary
from mmrf_jax.io import extras, files
from mmrf_jax.report import labels
from mmrf_jax.report.palette import AXIS, COLOURS, DIRECTIONS, GRID, INK, style

_GAP = (math.nan, math.nan)
_COLUMNS = 3  # of panels
_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # behind text, so that no line crosses it
_MARKERS = {
    **{"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "inverted_triangle": "v", "hex": "h"},
    "star": "*",
}


def require() -> None:
    """Check that plots can be drawn.

    Raises:
      MissingExtra: if Matplotlib is not installed.
    """
    with extras.needed("report"):
        import matplotlib.figure  # noqa: F401, slow to import, and needed only here


def _figure(**options: Any) -> Any:
    """Return a new `matplotlib.figure.Figure`."""
    require()
    from matplotlib.figure import Figure

    return Figure(**options)


def forest(result: Mapping[str, Any], path: str | os.PathLike, metrics: Sequence[str] | None = None) -> None:
    """Plot differences to the control with 95 % intervals, one panel per metric, as a PNG.

    Args:
      result: from `abtest.simulate.simulate_ab_test`.
      path: file to write.
      metrics: keys, None for the usual ones; metrics without any interval are left out. If only one arm has none, its
        row says why.
    """
    arms, signals = result["ab_test"], statistics.signals_of(result)
    less, usual = statistics.lower_is_better(signals), signals.choose(("like", "follow", "hate"))
    metrics = metrics or tuple(dict.fromkeys((signals.main, "depth", *usual, "return_rate")))
    control = statistics.control_of(arms)
    names = [a for a in arms if a != control]
    shown = [m for m in metrics if any(_there(arms[a].get(m)) for a in names)]
    if not shown:
        _save(_nothing(), path)
        return
    figure = _figure(figsize=(2.2 * len(shown) + 1.4, 0.45 * len(names) + 1.3), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    rows = list(range(len(names)))[::-1]
    for axis, metric in zip(axes, shown, strict=True):
        for row, name in zip(rows, names, strict=True):
            entry = arms[name].get(metric, {})
            if not _there(entry):
                axis.annotate(statistics.reason(entry), (0.0, row), ha="center", fontsize=8, color=INK)
                continue
            low, high = entry["ci95"]
            outcome = statistics.verdict(entry["ci95"], metric in less)
            colour, marker = DIRECTIONS[outcome]
            axis.plot([low, high], [row, row], color=colour, linewidth=1.8)
            fill = colour if outcome else "white"
            axis.plot(entry["diff_pct"], row, marker=_MARKERS[marker], color=colour, markerfacecolor=fill)
            axis.annotate(
                f"{labels.show(entry['diff_pct'], '+.1f')} %",
                (entry["diff_pct"], row),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=INK,
                bbox=_TEXT,
            )
        axis.axvline(0.0, color=INK, linestyle="--", linewidth=1.0)
        _dress(axis, labels.titled(signals, metric), f"difference to {control}, %")
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.3, y=0.35)
    axes[0].set_yticks(rows, names)
    _save(figure, path)


def days(result: Mapping[str, Any], path: str | os.PathLike, metrics: Sequence[str] | None = None) -> None:
    """Plot differences to the control by day with 95 % intervals, one panel per metric, as a PNG.

    Args:
      result: from `abtest.simulate_days.simulate_ab_test_by_day`.
      path: file to write.
      metrics: keys, None for the usual ones; metrics without any interval are left out, and days without one are gaps.
    """
    rows, signals, metrics = result["by_day"], statistics.signals_of(result), metrics or summary.daily(result)
    arms = list(result["ab_test"])
    control = statistics.control_of(result["ab_test"])
    shown = [m for m in metrics if any(_there(row["ab_test"][a].get(m)) for row in rows for a in arms if a != control)]
    if not shown:
        _save(_nothing(), path)
        return
    figure = _figure(figsize=(2.8 * len(shown) + 0.6, 3.0), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    at = [row["day"] for row in rows]
    for axis, metric in zip(axes, shown, strict=True):
        for number, arm in enumerate(arm for arm in arms if arm != control):
            entries = [row["ab_test"][arm][metric] for row in rows]
            low, high = zip(*(entry["ci95"] if _there(entry) else _GAP for entry in entries), strict=True)
            look = style(number)
            axis.fill_between(at, low, high, color=look["colour"], alpha=0.2, linewidth=0)
            diffs = [entry["diff_pct"] if _there(entry) else math.nan for entry in entries]
            marker = _MARKERS[look["marker"]]
            axis.plot(at, diffs, color=look["colour"], marker=marker, label=arm, markersize=4, linewidth=1.5)
        axis.axhline(0.0, color=INK, linestyle="--", linewidth=1.0, label=control)
        _dress(axis, labels.titled(signals, metric), "day")
        axis.locator_params(axis="x", integer=True)
    axes[0].set_ylabel(f"difference to {control}, %", fontsize=9, color=INK)
    axes[0].legend(fontsize=8, frameon=False, labelcolor=INK)
    _save(figure, path)


def growth(results: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Plot costs over size, on a logarithmic axis, one panel per part and unit, as a PNG.

    Args:
      results: [{"name": "part/what/size", "value", "unit"}] from `mmrf benchmark --suite=scale`.
      path: file to write.
    """
    panels: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for entry in results:
        part, what, size = entry["name"].split("/")
        if size.isdigit():
            panels.setdefault((part, entry["unit"]), {}).setdefault(what, []).append((int(size), entry["value"]))
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    figure = _figure(figsize=(3.2 * columns + 0.4, 2.6 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, ((part, unit), curves) in zip(axes, panels.items(), strict=False):
        for number, (what, points) in enumerate(curves.items()):
            look = style(number)
            marker = _MARKERS[look["marker"]]
            axis.plot(*zip(*points, strict=True), marker=marker, color=look["colour"], linewidth=1.5, label=what)
        axis.set_xscale("log")
        sizes = sorted({size for points in curves.values() for size, _ in points})
        if sizes[-1] < 100:  # a few processes: label the sizes instead of powers of ten
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
        x, y = labels.growth_axes(part, unit)
        _dress(axis, part, x, y if len(curves) > 1 else f"{next(iter(curves))}, {y}")
        axis.set_ylim(0.0, 1.3 * max(value for points in curves.values() for _, value in points))
        if len(curves) > 1:
            axis.legend(fontsize=8, frameon=False, labelcolor=INK)
    _save(figure, path)


def limits(results: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Plot rates as shares of the machine's limits, which are the line at 1, as a PNG.

    Args:
      results: [{"name", "value", "unit", "limit", "fraction_of_limit"}] from `mmrf benchmark --suite=speed`; entries
        without a limit are left out.
      path: file to write.
    """
    entries = [entry for entry in results if "limit" in entry][::-1]
    figure = _figure(figsize=(7.6, 0.3 * len(entries) + 1.0), layout="constrained")
    axis = figure.subplots()
    for row, entry in enumerate(entries):
        axis.plot(entry["fraction_of_limit"], row, marker="o", color=COLOURS[0])
        text = f"{entry['value']:,.0f} {entry['unit']}"
        axis.annotate(
            text,
            (entry["fraction_of_limit"], row),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
            bbox=_TEXT,
        )
    axis.axvline(1.0, color=INK, linestyle="--", linewidth=1.0)
    axis.set_xscale("log")  # dots, because a bar has no 0 to start from
    axis.set_xlim(right=10.0 * max([1.0, *(entry["fraction_of_limit"] for entry in entries)]))
    _dress(axis, "", "share of the limit of this machine (1: as fast as it could be)")
    axis.set_yticks(range(len(entries)), [entry["name"] for entry in entries])
    _save(figure, path)


def _dress(axis: Any, title: str, x: str, y: str = "") -> None:
    """Give a panel the look of the page's charts."""
    axis.set_title(title, fontsize=10, fontweight="bold", loc="left", color=INK)
    axis.set_xlabel(x, fontsize=9, color=INK)
    axis.set_ylabel(y, fontsize=9, color=INK)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(AXIS)
    axis.tick_params(labelsize=8, color=AXIS, labelcolor=INK)


def _there(entry: Mapping[str, Any] | None) -> bool:
    """Return whether an entry has an interval."""
    return bool(entry) and entry["ci95"] is not None and None not in entry["ci95"]  # type: ignore[index]


def _nothing() -> Any:
    """Return a figure saying that there is nothing to draw."""
    figure = _figure(figsize=(5.0, 1.0))
    figure.text(0.5, 0.5, "too few events for any interval", ha="center", va="center")
    return figure


def _save(figure, path: str | os.PathLike) -> None:
    with files.new_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
