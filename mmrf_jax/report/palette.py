"""Colours, markers and dashes of charts on the page and of plots in files, in light and dark."""

from __future__ import annotations

#: Okabe and Ito's colours, with a marker and a dash for each, so that every series differs in all three.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex", "star")
DASHES = ("solid", "dashed", "dotdash", "dotted", "solid", "dashed", "dotdash")
#: A difference for the better, for the worse, or neither: colour and marker.
DIRECTIONS = {"better": ("#0072B2", "triangle"), "worse": ("#D55E00", "inverted_triangle"), "": ("#7b8794", "circle")}
INK, GRID, AXIS = "#1f2933", "#e4e7eb", "#9aa5b1"
PAPER = "#fefefe"  # behind text; not quite the white of text on dark cells, which stays white on a dark page
#: Colours of a dark page, which the script of the charts uses instead of those on the left.
DARK = {
    INK: "#e4e7eb",
    GRID: "#323c47",
    AXIS: "#7b8794",
    PAPER: "#1b222a",
    "#0072B2": "#4aa8e0",
    "#D55E00": "#ff8b4d",
    "#009E73": "#2fc49b",
    "#CC79A7": "#e59fc6",
    "#000000": "#ffffff",
    "#56B4E9": "#9bd4f5",
    "#7b8794": "#9aa5b1",
}


def style(index: int) -> dict[str, str]:
    """Return the colour, marker and dash of a series; those of 20 series are all different."""
    turn, i = divmod(index, len(COLOURS))
    marker, dash = (i + turn) % len(MARKERS), (i + turn) % len(DASHES)
    return {"colour": COLOURS[i], "marker": MARKERS[marker], "dash": DASHES[dash]}
