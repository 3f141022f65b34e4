"""Who is in which arm: assignment of users by hash, and the check that they fell into the arms as intended."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from scipy import special

MISMATCH = 0.001  # p-value of a sample ratio below which no metric is to be trusted


def assign(user_ids: np.ndarray, shares: Sequence[float], salt: str) -> np.ndarray:
    """Arm of each user by hash: the same for a user in any batch, order, process and machine.

    Args:
      user_ids: [n] integers.
      shares: one per arm, adding up to 1.
      salt: name of the experiment; assignments under different salts are independent.

    Returns:
      [n] int32 in [0, len(shares)).

    Raises:
      ValueError: for ids that are no integers or shares that do not add up to 1.
    """
    user_ids = np.asarray(user_ids)
    share = np.asarray(shares, np.float64)
    if not np.issubdtype(user_ids.dtype, np.integer):
        raise ValueError(f"user_ids must be integers, got {user_ids.dtype}")
    if share.ndim != 1 or not len(share) or (share < 0).any() or abs(share.sum() - 1.0) > 1e-9:
        raise ValueError(f"shares must be >= 0 and add up to 1, got {share.tolist()} (sum {share.sum():.6g})")
    key = np.frombuffer(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "<u8")[0]
    uniform = (_splitmix64(_splitmix64(user_ids.astype(np.uint64)) ^ key) >> np.uint64(11)) * 2.0**-53
    # The first arm whose cumulated share is above the number; the last edge is open so that rounding loses nobody.
    return np.searchsorted(np.cumsum(share)[:-1], uniform, side="right").astype(np.int32)


def sample_ratio_mismatch(counts: Sequence[int], expected_shares: Sequence[float]) -> float:
    """p-value of Pearson's chi-square test that users fell into the arms as intended.

    A p-value below 0.001 means that the assignment or the logging is broken, and no metric is to be trusted
    (Fabijan et al., "Diagnosing Sample Ratio Mismatch in Online Controlled Experiments", KDD 2019).

    Args:
      counts: users of each arm.
      expected_shares: the shares they were assigned by, each above 0; scaled to add up to 1.

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
    """The mixing step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), [n] uint64."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
