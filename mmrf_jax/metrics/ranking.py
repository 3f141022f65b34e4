"""Grouped AUC and XAUC: how well a score ranks each user's videos, averaged over users weighted by impressions.

GAUC (Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017) is for the binary
signals, XAUC (Zhan et al., "Deconfounding Duration Bias in Watch-time Prediction", KDD 2022) for watch time.
Everything is NumPy on the host, vectorised over users: one sort of the n impressions serves all labels. Both
metrics take O(n log n) time, XAUC by an exact count of the discordant pairs.

Letters: n impressions, L labels, U users who are eligible for a label.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_CHUNK_ROWS = 1 << 18  # rows per pass of the inversion count, so that its arrays fit in cache
_BLOCK_USERS = 1 << 16  # users per bootstrap block, so that their values fit in cache
_DRAW_CELLS = 1 << 20  # maximum resampled users held at a time by the bootstrap


@dataclass(frozen=True, eq=False)
class GroupedMetric:
    """A per-user metric and its mean weighted by impressions; users ascend, so that two such metrics can be paired."""

    value: float  # mean of `per_user` weighted by `impressions`; NaN without eligible users
    users: np.ndarray  # [U] ids, ascending, of the users for whom the metric is defined
    per_user: np.ndarray  # [U] float64 in [0, 1]
    impressions: np.ndarray  # [U] int64, all rows of the user, whatever their label

    @property
    def eligible_users(self) -> int:
        """Return U, the number of users in the mean."""
        return len(self.users)


#: A metric without eligible users.
NO_USERS = GroupedMetric(float("nan"), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Interval:
    """An estimate with a percentile interval from a bootstrap over users."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Decile:
    """A metric among the videos with `low < duration <= high` (`low <= duration` in the first decile)."""

    low: float  # seconds
    high: float  # seconds
    impressions: int
    metric: Any  # result of the metric function: a GroupedMetric or a dict of them


def grouped_auc(groups: np.ndarray, scores: np.ndarray, labels: Mapping[str, np.ndarray] | np.ndarray) -> dict:
    """Compute AUC per user (ties half, as in `sklearn.metrics.roc_auc_score`), weighted by the user's impressions.

    A user counts for a label if the user has rows of both classes. The weight is the number of all rows of the user.

    Args:
      groups: [n] integer user ids, in any order.
      scores: [n] float, higher is ranked higher; infinities are allowed.
      labels: name -> [n], or [n, L]; each 0/1 or bool.

    Returns:
      dict: label name (or column number, for an array) -> GroupedMetric.

    Raises:
      ValueError: for inconsistent shapes, scores with NaN or labels other than 0 and 1.
    """
    groups, scores = _check_rows(groups, scores)
    columns = _label_columns(labels, len(scores))
    order = np.lexsort((scores, groups))
    sorted_groups, sorted_scores = groups[order], scores[order]
    starts, sizes = _runs(_changes(sorted_groups))
    # Twice the average rank within the user, which keeps it an integer: first + last of the block of equal scores.
    tie_starts, tie_sizes = _runs(_changes(sorted_groups, sorted_scores))
    doubled_rank = np.repeat(2 * tie_starts + tie_sizes + 1, tie_sizes) - 2 * np.repeat(starts, sizes)
    users = sorted_groups[starts]
    result = {}
    for name, column in columns.items():
        label = column[order]
        positives = _group_sum(label, starts)
        negatives = sizes - positives
        doubled_wins = _group_sum(doubled_rank * label, starts) - positives * (positives + 1)
        result[name] = _weighted(users, doubled_wins, 2 * positives * negatives, sizes)
    return result


def grouped_xauc(groups: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> GroupedMetric:
    """Compute the exact concordance of score and play time within each user, weighted by the user's impressions.

    Over the pairs of one user's rows with *different* targets: a pair counts 1 if the score orders it as the target
    does, one half if the two scores are equal, 0 otherwise. Pairs with equal targets are left out, and so are users
    without other pairs. With a binary target this equals `grouped_auc`.

    Args:
      groups: [n] integer user ids, in any order.
      scores: [n] float, higher is ranked higher.
      targets: [n] float, such as play time in seconds.

    Raises:
      ValueError: for inconsistent shapes, or scores or targets with NaN.
    """
    groups, scores = _check_rows(groups, scores)
    targets = _check_numbers("targets", targets, len(scores))
    by_target = np.lexsort((scores, targets, groups))
    by_score = np.lexsort((targets, scores, groups))
    sorted_groups = groups[by_target]
    starts, sizes = _runs(_changes(sorted_groups))
    tied_target = _tied_pairs(_changes(sorted_groups, targets[by_target]), starts)
    tied_both = _tied_pairs(_changes(sorted_groups, targets[by_target], scores[by_target]), starts)
    tied_score = _tied_pairs(_changes(sorted_groups, scores[by_score]), starts)
    # Ranks in the score order of the rows in target order. Equal targets ascend in score and equal scores ascend in
    # target, so that an inversion is exactly a pair with both different and in opposite order.
    place = np.empty(len(scores), np.int32 if len(scores) < 2**31 else np.int64)
    place[by_score] = np.arange(len(scores), dtype=place.dtype)
    discordant = _inversions(place[by_target], starts, sizes)
    pairs = sizes * (sizes - 1) // 2 - tied_target
    doubled_wins = 2 * (pairs - discordant) - (tied_score - tied_both)
    return _weighted(sorted_groups[starts], doubled_wins, 2 * pairs, sizes)


def above_median(
    train_users: np.ndarray, train_play: np.ndarray, test_users: np.ndarray, test_play: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Label rows whose value, such as play time, is (strictly) above the user's training median.

    Args:
      train_users: [m] user ids of the training rows.
      train_play: [m] play time in seconds of the training rows.
      test_users: [n] user ids of the rows to label.
      test_play: [n] play time in seconds of the rows to label.

    Returns:
      label: [n] bool, False where the mask is.
      mask: [n] bool, False for rows of users without training rows: leave them out.
      left_out: the number of those users.

    Raises:
      ValueError: for inconsistent shapes, or play times with NaN.
    """
    test_users, test_play = _check_rows(test_users, test_play, "test_users", "test_play")
    if not len(train_users):
        none = np.zeros(len(test_users), bool)
        return none, none, len(np.unique(test_users))
    train_users, train_play = _check_rows(train_users, train_play, "train_users", "train_play")
    order = np.lexsort((train_play, train_users))
    sorted_users, sorted_play = train_users[order], train_play[order]
    starts, sizes = _runs(_changes(sorted_users))
    medians = 0.5 * (sorted_play[starts + (sizes - 1) // 2] + sorted_play[starts + sizes // 2].astype(np.float64))
    known = sorted_users[starts]
    found = np.minimum(np.searchsorted(known, test_users), len(known) - 1)
    mask = known[found] == test_users
    return mask & (test_play > medians[found]), mask, len(np.unique(test_users[~mask]))


def by_decile(
    duration: np.ndarray,
    groups: np.ndarray,
    scores: np.ndarray,
    labels: Mapping[str, np.ndarray] | np.ndarray,
    metric: Callable[..., Any] = grouped_auc,
) -> list[Decile]:
    """Compute a metric within deciles of video duration, so that users are compared on videos of similar length.

    Args:
      duration: [n] seconds. Deciles are of the impressions; with many equal durations they are of unequal size, and
        empty ones are left out.
      groups: as `metric` takes them.
      scores: as `metric` takes them.
      labels: as `metric` takes them.
      metric: `grouped_auc` or `grouped_xauc` (then `labels` are the targets).

    Returns:
      At most ten Decile, ascending in duration; eligibility and weights are those within the decile.

    Raises:
      ValueError: for inconsistent shapes or durations with NaN.
    """
    groups, scores = _check_rows(groups, scores)
    duration = _check_numbers("duration", duration, len(scores))
    columns = labels if isinstance(labels, Mapping) else np.asarray(labels)
    edges = np.quantile(duration, np.linspace(0.0, 1.0, 11), method="higher")
    tenth = np.searchsorted(edges[1:-1], duration, side="left")
    deciles = []
    for index in range(10):
        rows = np.flatnonzero(tenth == index)
        if not len(rows):
            continue
        part = {k: np.asarray(v)[rows] for k, v in columns.items()} if isinstance(columns, Mapping) else columns[rows]
        value = metric(groups[rows], scores[rows], part)
        deciles.append(Decile(float(edges[index]), float(edges[index + 1]), len(rows), value))
    return deciles


def bootstrap_interval(
    values: np.ndarray, weights: np.ndarray, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Compute a percentile interval of Σ w v / Σ w by resampling users, the independent units, with replacement.

    Args:
      values: [U] one number per user, such as GroupedMetric.per_user.
      weights: [U] non-negative, such as GroupedMetric.impressions.
      draws: bootstrap samples; memory does not grow with it.
      seed: the same seed gives the same interval.
      level: coverage, 0.95 for a 95 % interval.

    Raises:
      ValueError: for inconsistent shapes, no users, NaN, or weights that are negative or all zero.
    """
    values = np.asarray(values, np.float64)
    weights = np.asarray(weights, np.float64)
    if values.ndim != 1 or values.shape != weights.shape or not len(values):
        raise ValueError(f"values {values.shape} and weights {weights.shape} must be one row per user, at least one")
    if not np.isfinite(values).all() or not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() == 0:
        raise ValueError("values and weights must be finite and weights >= 0, some > 0; leave ineligible users out")
    totals = _resampled_sums(np.stack([weights * values, weights]), draws, np.random.default_rng(seed))
    means = np.divide(totals[0], totals[1], out=np.full(draws, np.nan), where=totals[1] > 0)
    low, high = np.nanquantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(np.dot(weights, values) / weights.sum()), float(low), float(high))


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Compute an interval of the weighted mean of a − b over the same users; a is better than b if it is above 0.

    Args:
      a: [U] the metric of each user under the first method.
      b: [U] the same under the second, users in the same order (as in two `grouped_auc` calls on the same rows and
        labels).
      weights, draws, seed, level: as in `bootstrap_interval`.

    Raises:
      ValueError: as in `bootstrap_interval`, and for a and b of different shapes.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a {a.shape} and b {b.shape} must be of the same users: evaluate both on the same rows")
    return bootstrap_interval(a - b, weights, draws, seed, level)


def _resampled_sums(columns: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Return sums [R, draws] of columns [R, U] over users drawn with replacement.

    Users are processed in blocks that fit in cache; the number of the U draws in each block is multinomial.
    """
    users = columns.shape[1]
    edges = np.linspace(0, users, -(-users // _BLOCK_USERS) + 1).astype(np.int64)
    counts = rng.multinomial(users, np.diff(edges) / users, size=draws)  # [draws, blocks]
    sums = np.zeros((len(columns), draws))
    for block, (first_user, end_user) in enumerate(itertools.pairwise(edges)):
        chunk = max(1, _DRAW_CELLS // (end_user - first_user))
        for first in range(0, draws, chunk):
            drawn = counts[first : first + chunk, block]
            sample = rng.integers(first_user, end_user, drawn.sum(), dtype=np.int32)
            starts = np.cumsum(drawn) - drawn
            for column, total in zip(columns, sums, strict=True):
                total[first : first + chunk] += np.add.reduceat(column.take(sample), starts)
    return sums


def _check_numbers(name: str, values: np.ndarray, rows: int) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (rows,):
        raise ValueError(f"{name} has shape {values.shape}, expected ({rows},): one per impression")
    if np.isnan(values).any():
        raise ValueError(f"{name} has {int(np.isnan(values).sum())} NaN among {rows} rows: mask them out first")
    return values


def _check_rows(
    groups: np.ndarray, scores: np.ndarray, group_name: str = "groups", score_name: str = "scores"
) -> tuple[np.ndarray, np.ndarray]:
    groups = np.asarray(groups)
    if groups.ndim != 1 or not len(groups) or not np.issubdtype(groups.dtype, np.integer):
        raise ValueError(f"{group_name} must be integers of shape [n], n >= 1; got {groups.dtype} {groups.shape}")
    return groups, _check_numbers(score_name, scores, len(groups))


def _label_columns(labels: Mapping[str, np.ndarray] | np.ndarray, rows: int) -> dict[Any, np.ndarray]:
    """Return name -> [n] uint8, checked to be binary."""
    if isinstance(labels, Mapping):
        columns: dict[Any, np.ndarray] = {name: np.asarray(column) for name, column in labels.items()}
    else:
        columns = dict(enumerate(np.atleast_2d(np.asarray(labels).T)))
    for name, column in columns.items():
        if column.shape != (rows,):
            raise ValueError(f"label {name!r} has shape {column.shape}, expected ({rows},): one per impression")
        positive = column == 1
        if not np.all(positive | (column == 0)):
            raise ValueError(f"label {name!r} must be 0 or 1, has values in [{column.min()}, {column.max()}]")
        columns[name] = positive.astype(np.uint8)
    return columns


def _changes(*columns: np.ndarray) -> np.ndarray:
    """Return [n] bool: rows of sorted columns that differ from the previous row in any column; the first is True."""
    new = np.ones(len(columns[0]), bool)
    np.not_equal(columns[0][1:], columns[0][:-1], out=new[1:])
    for column in columns[1:]:
        new[1:] |= column[1:] != column[:-1]
    return new


def _runs(new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first rows and lengths of the runs that `new` starts."""
    starts = np.flatnonzero(new)
    return starts, np.diff(starts, append=len(new))


def _group_sum(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, starts, dtype=np.int64)


def _tied_pairs(new: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Count pairs within the runs that `new` starts, by group: the sum of the rows' positions in their runs."""
    run_starts, run_sizes = _runs(new)
    return _group_sum(np.arange(len(new)) - np.repeat(run_starts, run_sizes), starts)


def _inversions(place: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Count the inversions of each group of a permutation in O(n log(largest group)), by passes over bits, not groups.

    `place` [n] is a permutation of 0 … n−1 that keeps every group's rows [start, start + size) in place. Going down
    the bits of the place within the group, as in a wavelet tree, the rows are partitioned by the bit, keeping their
    order: a row with bit 0 is inverted with every row before it in its node (equal higher bits) that has bit 1.
    """
    counts = np.empty(len(starts), np.int64)
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + _CHUNK_ROWS)) - 1)
        if starts[-1] + sizes[-1] <= starts[first] + _CHUNK_ROWS:
            last = len(starts)
        rows = slice(starts[first], starts[last - 1] + sizes[last - 1])
        chunk_starts, chunk_sizes = starts[first:last] - starts[first], sizes[first:last]
        group_start = np.repeat(chunk_starts, chunk_sizes).astype(place.dtype)
        counts[first:last] = _chunk_inversions(place[rows] - starts[first] - group_start, group_start, chunk_starts)
        first = last
    return counts


def _chunk_inversions(rank: np.ndarray, group_start: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Count the inversions of one chunk.

    `rank` [m] is the place within the group, `group_start` [m] the group's first row in this chunk.
    """
    rank = rank.astype(group_start.dtype)
    position = np.arange(len(rank), dtype=rank.dtype)
    counts = np.zeros(len(starts), np.int64)
    for bit in reversed(range(int(rank.max()).bit_length())):
        node = group_start + ((rank >> (bit + 1)) << (bit + 1))  # first row of the node: all smaller places precede it
        one = (rank >> bit) & 1
        ones_before = np.cumsum(one, dtype=rank.dtype) - one
        ones_before -= ones_before[node]
        counts += _group_sum((1 - one) * ones_before, starts)
        moved = np.where(one == 1, node + (1 << bit) + ones_before, position - ones_before)
        partitioned = np.empty_like(rank)
        partitioned[moved] = rank
        rank = partitioned
    return counts


def _weighted(users: np.ndarray, wins: np.ndarray, pairs: np.ndarray, impressions: np.ndarray) -> GroupedMetric:
    """Return the metric wins / pairs of users with pairs > 0, and its mean weighted by impressions."""
    kept = pairs > 0
    per_user = wins[kept] / pairs[kept]
    weights = impressions[kept]
    value = float(np.dot(per_user, weights) / weights.sum()) if kept.any() else float("nan")
    return GroupedMetric(value, users[kept], per_user, weights)
