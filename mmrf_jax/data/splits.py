"""Splitting a log by date into training days, then validation days, then test days."""

from __future__ import annotations

import dataclasses

import numpy as np

SPLITS = ("train", "valid", "test")
#: Parts of the rows that were shown at random, by the split with the same days.
RANDOM = {f"random_{name}": name for name in SPLITS}
PARTS = (*SPLITS, *RANDOM)


@dataclasses.dataclass(frozen=True)
class SplitDates:
    """Boundaries between the splits; integers compared with a log's `date`, such as 20220502.

    Attributes:
      train_until: last day of train.
      valid_until: last day of valid.
      test_from: first day of test; days between `valid_until` and `test_from` are in no split.

    Raises:
      ValueError: unless train_until < valid_until < test_from.
    """

    train_until: int = 20220502
    valid_until: int = 20220503
    test_from: int = 20220504

    def __post_init__(self):
        if self.valid_until <= self.train_until:
            raise ValueError(
                f"valid_until={self.valid_until} is not after train_until={self.train_until}; set it to a later day"
            )
        if self.test_from <= self.valid_until:
            raise ValueError(
                f"test_from={self.test_from} is not after valid_until={self.valid_until}; set it to a later day"
            )

    def split_of(self, dates: np.ndarray) -> np.ndarray:
        """Return the position in `SPLITS` of every date, −1 for days in no split; int8, with the shape of `dates`."""
        dates = np.asarray(dates)
        split = np.where(dates <= self.train_until, 0, np.where(dates <= self.valid_until, 1, 2))
        return np.where((dates > self.valid_until) & (dates < self.test_from), -1, split).astype(np.int8)
