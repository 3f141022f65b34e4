"""Rows of a log as slots of slates: running products from the top and sums to the end. NumPy only.

Letters: n rows, one for each slot of each slate, in any order; P positions; T slates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable

import numpy as np
from numpy.typing import ArrayLike

from mmrf_jax.estimate import column, unit_numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Slates:
    """Where each row is in its slate.

    Attributes:
      slate: [n] int64 number of the row's slate, in order of first appearance.
      place: [n] int64 number of the row's position among all positions, ascending.
      above: [n] int64 row right above; the row itself at the top.
      levels: rows [·] at the top, those second from the top, and so on.
    """

    slate: np.ndarray
    place: np.ndarray
    above: np.ndarray
    levels: list[np.ndarray]

    @property
    def top(self) -> np.ndarray:
        """Return [n] bool: whether the row is the top of its slate."""
        return self.above == np.arange(len(self.above))

    def running_product(self, values: np.ndarray) -> np.ndarray:
        """Return the product [n] of a slate's values from its top to each row."""
        products = np.array(values, np.float64)
        for rows in self.levels[1:]:
            products[rows] *= products[self.above[rows]]
        return products

    def product(self, values: np.ndarray) -> np.ndarray:
        """Return the product [n] of all values of the row's slate."""
        running, whole = self.running_product(values), np.ones(self.slate.max(initial=-1) + 1)
        for rows in self.levels:
            whole[self.slate[rows]] = running[rows]
        return whole[self.slate]

    def sum_to_end(self, values: np.ndarray) -> np.ndarray:
        """Return the sum [n] of a slate's values from each row to its end."""
        sums = np.array(values, np.float64)
        for rows in reversed(self.levels[1:]):
            sums[self.above[rows]] += sums[rows]
        return sums


def alone(rows: int) -> Slates:
    """Return the slates of a log where each row is one."""
    number = np.arange(rows)
    return Slates(number, np.zeros(rows, np.int64), number, [number])


def of_rows(slate_id: Iterable[Hashable], position: ArrayLike | None, rows: int) -> Slates:
    """Find the slates of a log.

    Args:
      slate_id: [n] ids of any hashable type.
      position: [n] numbers, ascending from the top, all different within a slate; None: a slate's rows are in order.
      rows: n.

    Raises:
      ValueError: for shapes that disagree, missing ids, or a position twice in a slate.
    """
    slate = unit_numbers(slate_id, "slate_id", rows)
    given = np.arange(rows) if position is None else column("position", position, ("reward", rows))
    order = np.lexsort((given, slate))
    starts = np.flatnonzero(np.diff(slate[order], prepend=-1))
    rank = np.empty(rows, np.int64)
    rank[order] = np.arange(rows) - np.repeat(starts, np.diff(starts, append=rows))
    above = np.arange(rows)
    below = order[rank[order] > 0]
    above[below] = order[np.flatnonzero(rank[order] > 0) - 1]
    twice = below[given[below] == given[above[below]]]
    if len(twice):
        raise ValueError(
            f"position of row {twice[0]} is {given[twice[0]]}, as that of row {above[twice[0]]} of the same slate; "
            "give each row of a slate a position that no other has"
        )
    by_rank = np.argsort(rank, kind="stable")
    levels = np.split(by_rank, np.cumsum(np.bincount(rank))[:-1]) if rows else []
    place = rank if position is None else np.unique(given, return_inverse=True)[1]
    return Slates(slate, place, above, levels)
