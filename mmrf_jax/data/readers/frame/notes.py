"""What reading a log assumes, and what it leaves out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import polars as pl


@dataclasses.dataclass
class Notes:
    """What was assumed about a log, and how many rows were left out, by reason; those of parts of a log add up.

    Attributes:
      assumed: texts.
      counted: {text: [number, of how many, or 0]} of texts that begin with a number, such as "empty cells of like are
        0"; those with a number of 0 are not said.
      left_out: {reason: rows}.
    """

    assumed: list[str] = dataclasses.field(default_factory=list)
    counted: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)

    def assume(self, text: str) -> None:
        """Note a text once."""
        if text not in self.assumed:
            self.assumed.append(text)

    def count(self, text: str, number: int, among: int = 0) -> None:
        """Add to the numbers of a text."""
        have = self.counted.setdefault(text, [0, 0])
        have[0] += number
        have[1] += among

    def leave_out(self, reason: str, rows: int) -> None:
        """Add to the rows left out for a reason."""
        if rows:
            self.left_out[reason] = self.left_out.get(reason, 0) + rows

    def drop(self, frame: pl.DataFrame, unusable: pl.Expr, reason: str) -> pl.DataFrame:
        """Leave out rows and count them."""
        kept = frame.filter(~unusable.fill_null(True))
        self.leave_out(reason, len(frame) - len(kept))
        return kept

    def add(self, other: Mapping[str, Any]) -> None:
        """Add the fields of other notes."""
        for text in other["assumed"]:
            self.assume(text)
        for text, (number, among) in other["counted"].items():
            self.count(text, number, among)
        for reason, rows in other["left_out"].items():
            self.leave_out(reason, rows)

    def lines(self) -> list[str]:
        """Return all that was assumed, in words."""
        counted = [
            f"{number:,} of {among:,} {text}" if among else f"{number:,} {text}"
            for text, (number, among) in self.counted.items()
            if number
        ]
        return self.assumed + counted
