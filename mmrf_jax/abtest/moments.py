"""Streaming means and covariances of rows, in float64."""

from __future__ import annotations

import numpy as np

BLOCK_ROWS = 1 << 15


class Moments:
    """Count, mean [M] and sum of products of deviations [M, M] of rows (Chan, Golub and LeVeque's update)."""

    def __init__(self, size: int):
        self.count = 0
        self.mean = np.zeros(size)
        self.products = np.zeros((size, size))

    def update(self, rows: np.ndarray) -> None:
        """Add rows [n, M]."""
        for first in range(0, len(rows), BLOCK_ROWS):
            block = rows[first : first + BLOCK_ROWS]
            mean = block.mean(axis=0)
            centred, shift = block - mean, mean - self.mean
            total = self.count + len(block)
            self.products += centred.T @ centred + np.outer(shift, shift) * (self.count * len(block) / total)
            self.mean = self.mean + shift * (len(block) / total)
            self.count = total

    def covariance(self) -> np.ndarray:
        """Return the unbiased covariance [M, M]; needs at least two rows."""
        return self.products / (self.count - 1)
