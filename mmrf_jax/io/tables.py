"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format cells as a Markdown table.

    Raises:
      ValueError: for a row with another number of cells than the header.

    Example:
      >>> print(markdown(["arm", "users"], [["control", "5012"]]))
      | arm | users |
      |---|---|
      | control | 5012 |
    """
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"row {list(row)} has {len(row)} cells, the header {list(header)} {len(header)}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
