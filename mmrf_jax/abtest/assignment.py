"""Assignment of users to arms by hash, and the test for sample ratio mismatch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from scipy import special

MISMATCH = 0.001  # p-value of the sample ratio below which no metric can be trusted


def assign(user_ids: np.ndarray, shares: Sequence[float], salt: str) -> np.ndarray:
    """Assign each user to an arm by hash, independently of batch, order, process and machine.

    Args:
      user_ids: [n] integers.
      shares: one per arm, summing to 1.
      salt: name of the experiment; assignments under different salts are independent.

    Returns:
      [n] int32 in [0, len(shares)).

    Raises:
      ValueError: for ids that are not integers, or shares that do not sum to 1.
    """
    user_ids = np.asarray(user_ids)
    share = np.asarray(shares, np.float64)
    if not np.issubdtype(user_ids.dtype, np.integer):
        raise ValueError(f"user_ids must be integers, got {user_ids.dtype}")
    if share.ndim != 1 or not len(share) or (share < 0).any() or abs(share.sum() - 1.0) > 1e-9:
        raise ValueError(f"shares must be >= 0 and add up to 1, got {share.tolist()} (sum {share.sum():.6g})")
    key = np.frombuffer(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "<u8")[0]
    uniform = (_splitmix64(_splitmix64(user_ids.astype(np.uint64)) ^ key) >> np.uint64(11)) * 2.0**-53
    # The first arm whose cumulative share exceeds the number. Dropping the last edge keeps rounding from losing users.
    return np.searchsorted(np.cumsum(share)[:-1], uniform, side="right").astype(np.int32)


def sample_ratio_mismatch(counts: Sequence[int], expected_shares: Sequence[float]) -> float:
    """Return the p-value of Pearson's chi-square test of the users' split between the arms.

    A p-value below 0.001 means that the assignment or the logging is broken and no metric can be trusted
    (Fabijan et al., "Diagnosing Sample Ratio Mismatch in Online Controlled Experiments", KDD 2019).

    Args:
      counts: users of each arm.
      expected_shares: assignment shares, each above 0; normalised to sum to 1.

    Raises:
      ValueError: for lengths that differ or are below 2, no users, negative counts, or a share that is not above 0.
    """
    observed, shares = np.asarray(counts, np.float64), np.asarray(expected_shares, np.float64)
    if observed.ndim != 1 or observed.shape != shares.shape or len(observed) < 2:
        raise ValueError(
            f"counts {observed.shape} and expected_shares {shares.shape} need one number for each arm, >= 2"
        )
    if observed.sum() <= 0 or (observed < 0).any() or (shares <= 0).any():
        raise ValueError(f"counts {observed.tolist()} must be >= 0, some > 0, and shares {shares.tolist()} all > 0")
    expected = observed.sum() * shares / shares.sum()
    return float(special.chdtrc(len(observed) - 1, ((observed - expected) ** 2 / expected).sum()))


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """Apply the mixing step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), [n] uint64."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
