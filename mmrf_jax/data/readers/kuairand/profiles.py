"""User profiles: features fitted on the users of the training days only."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import polars as pl

from mmrf_jax.data.readers.kuairand import columns, fits

MAX_ONE_HOT = 16


@dataclasses.dataclass
class Profiles:
    """User features by user id; users without any have zeros."""

    user_id: np.ndarray  # [U + 1] int32, or int64 if ids are too large for it; −1 in row 0
    values: np.ndarray  # [U + 1, Du] float32, zeros in row 0
    fitted: dict[str, np.ndarray]

    def of(self, user_id: np.ndarray) -> np.ndarray:
        """Return [n, Du] float32 profiles of user ids [n]."""
        return self.values[self.rows_of(user_id)]

    def rows_of(self, user_id: np.ndarray) -> np.ndarray:
        """Return [n] int32 rows of user ids; 0 if unknown."""
        row = np.minimum(np.searchsorted(self.user_id, user_id), len(self.user_id) - 1)
        return np.where(self.user_id[row] == user_id, row, 0).astype(np.int32)


def write_profiles(profiles: Profiles, folder: pathlib.Path) -> None:
    """Write one npy file per array; see `read_profiles`."""
    for name, value in {"user_id": profiles.user_id, "values": profiles.values}.items():
        np.save(folder / f"{name}.npy", value)
    for name, value in profiles.fitted.items():
        np.save(folder / f"fitted-{name}.npy", value)


def read_profiles(folder: pathlib.Path) -> Profiles:
    """Read profiles written by `write_profiles`; arrays are memory-mapped."""
    arrays, fitted = fits.read_arrays(folder)
    return Profiles(fitted=fitted, **arrays)


def build_profiles(users: pl.DataFrame, train_users: np.ndarray) -> Profiles:
    """Build the user profiles [U + 1, Du].

    KuaiRand releases user features as one snapshot, not day by day; they are used unchanged. One-hot activity degree;
    flags (1 only if the value is 1: `is_live_streamer` has −124 for no); standardised log1p counts; one-hot anonymous
    codes, those with more than 16 values hashed to 16 buckets. Missing values are zeros.

    Args:
      users: the rows of `columns.read_users`; of rows with the same user the first counts.
      train_users: ids of the users of the training rows, on whom everything is fitted.
    """
    users = users.filter(pl.col("user_id").is_not_null())
    users = users.unique("user_id", keep="first", maintain_order=True).sort("user_id")
    user_id = users["user_id"].to_numpy()
    train = np.isin(user_id, train_users)
    fitted: dict[str, np.ndarray] = {}
    degree = users["user_active_degree"].fill_null("").to_numpy().astype(str)
    fitted["user_active_degree"] = np.unique(degree[train & (degree != "")])
    parts = [degree[:, None] == fitted["user_active_degree"]]
    parts += [(users[name].to_numpy() == 1)[:, None] for name in columns.USER_FLAGS]
    for name in columns.USER_COUNTS:
        counts = users[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
        known = ~np.isnan(counts)
        value = np.log1p(np.maximum(np.nan_to_num(counts), 0))
        fitted[name] = fits.mean_std(value, (known & train).astype(np.int64))
        parts.append(fits.standardise(value, known, fitted[name])[:, None])
    for name in columns.USER_CODES:
        codes = users[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
        values = np.unique(codes[train & ~np.isnan(codes)])
        fitted[name] = values if len(values) <= MAX_ONE_HOT else np.empty(0)  # empty: hashed
        if len(values) <= MAX_ONE_HOT:
            parts.append(codes[:, None] == values)
        else:
            hashed = (np.nan_to_num(codes).astype(np.int64) * 2654435761 % 2**32) >> 28
            parts.append(fits.one_hot(np.where(np.isnan(codes), -1, hashed), MAX_ONE_HOT))
    values = np.concatenate(parts, axis=1).astype(np.float32)
    return Profiles(
        user_id=np.concatenate([[-1], user_id]).astype(user_id.dtype),
        values=np.concatenate([np.zeros((1, values.shape[1]), np.float32), values]),
        fitted=fitted,
    )
