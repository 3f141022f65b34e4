"""An estimate with its interval: what the functions of `mmrf_jax.metrics` and `mmrf_jax.ope` return."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np

#: Independent units with any event, below which no interval is given. Several events of one unit count once.
MIN_EVENTS = 25


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its interval; what is undefined is NaN, and `note` says why.

    Attributes:
      value: the estimate.
      low, high: ends of its interval.
      n: independent units behind it, such as eligible groups.
      ess: effective sample size in rows (Kish) of a weighted estimate; NaN elsewhere.
      note: why a number is NaN; empty where none is.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    ess: float = math.nan
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}], n={self.n}"
        text += "" if math.isnan(self.ess) else f", ess={self.ess:.1f}"
        return f"{text} ({self.note})" if self.note else text


def unit_numbers(units: Sequence[Hashable]) -> np.ndarray:
    """Return the number [n] int64 of each row's unit, in order of first appearance; ids are of any hashable type."""
    numbers: dict[Hashable, int] = {}
    ids = units.tolist() if hasattr(units, "tolist") else units
    return np.array([numbers.setdefault(one, len(numbers)) for one in ids], np.int64)
