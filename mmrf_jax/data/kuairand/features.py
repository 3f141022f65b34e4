"""What is known of videos and users: vocabularies, features and the days on which a video can be a candidate.

Everything that is fitted — vocabularies, normalisers, buckets — is fitted on the standard-log rows of the training days
only. `video_features_statistic` is never read: its averages are over the whole month, test days included.
"""

from __future__ import annotations

import dataclasses
import datetime

import numpy as np
import polars as pl

from mmrf_jax import types
from mmrf_jax.data.kuairand import columns

NEVER = 99999999  # a day after all others
DURATION_BUCKETS = 8
VIDEO_TYPES, UPLOAD_TYPES = 3, 8
MAX_ONE_HOT = 16


@dataclasses.dataclass
class Catalogue:
    """All videos of the feature files and logs; row 0 is an unknown video.

    Rows are ordered by video id where the feature file has the video, then by first day in the logs, so that no row
    of an earlier day moves when later days change.
    """

    video_id: np.ndarray  # [V] int32 of KuaiRand, −1 in row 0
    items: types.Items  # of NumPy arrays, [V]
    live_from: np.ndarray  # [V] int32, first day on which it may be a candidate, or NEVER
    random_from: np.ndarray  # [V] int32, the day after its first random exposure, or NEVER
    fitted: dict[str, np.ndarray]  # vocabularies and normalisers, for inspection and tests

    def rows_of(self, video_id: np.ndarray) -> np.ndarray:
        """Item rows of KuaiRand video ids, int32; 0 where unknown."""
        return _lookup(self.video_id, video_id)


def build_catalogue(rows: pl.DataFrame, videos: pl.DataFrame, train_until: int) -> Catalogue:
    """Item table, vocabularies and live days.

    Item features [V, Di], Di = 1 + 8 + 4 + 9 + 1: standardised log duration; one-hot bucket of duration (quantiles of
    the training rows); one-hot of the video type and of the upload type (the frequent ones of training videos, then
    other); standardised log1p of the days from upload to `train_until`, at least 0. What is missing is zeros.

    Args:
      rows: usable log rows (`clean.clean_log`).
      videos: `columns.read_videos`.
      train_until: last training day.

    Raises:
      ValueError: where no standard-log row is in the training days.
    """
    train = rows.filter((pl.col("is_rand") == 0) & (pl.col("date") <= train_until))
    if not train.height:
        first = rows.filter(pl.col("is_rand") == 0)["date"].min()
        raise ValueError(
            f"no standard-log row on or before train_until={train_until}; the first is of {first!s}: set it later"
        )
    seen = (
        rows.sort("date", "time_ms", maintain_order=True)
        .group_by("video_id")
        .agg(pl.col("date").first().alias("seen"), pl.col("duration_ms").first().cast(pl.Float64).alias("seen_ms"))
    )
    random = rows.filter(pl.col("is_rand") == 1).group_by("video_id").agg(pl.col("date").min().alias("random"))
    featured = videos.filter(pl.col("video_id").is_not_null()).with_columns(pl.lit(0, pl.Int32).alias("place"))
    unlisted = seen.join(featured, "video_id", "anti").select("video_id", pl.col("seen").alias("place"))
    table = (
        pl.concat([featured, unlisted], how="diagonal")
        .join(seen, "video_id", "left")
        .join(random, "video_id", "left")
        .sort("place", "video_id")
    )
    uploaded = table["upload_dt"].fill_null(table["seen"] + 1).fill_null(NEVER).to_numpy()
    timed = np.where(table["duration_ms"].is_null(), (table["seen"] + 1).fill_null(NEVER).to_numpy(), 0)
    video_id = np.concatenate([[-1], table["video_id"].to_numpy()]).astype(np.int32)
    train_rows = _lookup(video_id, train["video_id"].to_numpy())
    in_train = np.zeros(len(video_id), bool)
    in_train[train_rows] = True

    ids, embedding_id = _vocabulary(video_id, in_train)
    authors, author = _vocabulary(_with_unknown(table["author_id"], -1), in_train)
    tags, tag = _vocabulary(_with_unknown(table["tag"], -1), in_train)
    seconds = _with_unknown(table["duration_ms"].fill_null(table["seen_ms"]), 0.0) / 1000
    log_seconds, duration_fit = _standardise(np.log(np.maximum(seconds, 0.1)), seconds > 0, train_rows)
    edges = np.quantile(seconds[train_rows], np.arange(1, DURATION_BUCKETS) / DURATION_BUCKETS)
    bucket = np.where(seconds > 0, np.searchsorted(edges, seconds, side="right"), -1)
    video_types, video_type = _frequent(table["video_type"], in_train, VIDEO_TYPES)
    upload_types, upload_type = _frequent(table["upload_type"], in_train, UPLOAD_TYPES)
    upload = _day_numbers(_with_unknown(table["upload_dt"], 0))
    days = np.maximum(_day_number(train_until) - upload, 0)
    age, age_fit = _standardise(np.log1p(days), upload > 0, train_rows)
    features = np.concatenate(
        [
            log_seconds[:, None],
            _one_hot(bucket, DURATION_BUCKETS),
            _one_hot(video_type, VIDEO_TYPES + 1),
            _one_hot(upload_type, UPLOAD_TYPES + 1),
            age[:, None],
        ],
        axis=1,
    ).astype(np.float32)
    return Catalogue(
        video_id=video_id,
        items=types.Items(
            author=author,
            tag=tag,
            duration=seconds.astype(np.float32),
            features=features,
            embedding_id=embedding_id,
            num_embeddings=len(ids) + 1,
            num_authors=len(authors) + 1,
            num_tags=len(tags) + 1,
        ),
        live_from=np.concatenate([[NEVER], np.maximum(uploaded, timed)]).astype(np.int32),
        random_from=np.concatenate([[NEVER], (table["random"] + 1).fill_null(NEVER).to_numpy()]).astype(np.int32),
        fitted={
            "video_vocabulary": ids,
            "author_vocabulary": authors,
            "tag_vocabulary": tags,
            "duration_edges": edges,
            "log_duration_mean_std": duration_fit,
            "log_age_mean_std": age_fit,
            "video_types": video_types,
            "upload_types": upload_types,
        },
    )


@dataclasses.dataclass
class Profiles:
    """User features by user id; users without any have zeros."""

    user_id: np.ndarray  # [U + 1] int32, −1 in row 0
    values: np.ndarray  # [U + 1, Du] float32, zeros in row 0
    fitted: dict[str, np.ndarray]

    def of(self, user_id: np.ndarray) -> np.ndarray:
        """[n, Du] float32 profiles of user ids [n]."""
        return self.values[self.rows_of(user_id)]

    def rows_of(self, user_id: np.ndarray) -> np.ndarray:
        """[n] int32 rows of user ids; 0 where unknown."""
        return _lookup(self.user_id, user_id)


def build_profiles(users: pl.DataFrame, train_users: np.ndarray) -> Profiles:
    """User profiles [U + 1, Du].

    KuaiRand releases user features as of one snapshot, not day by day; they are used as they are. One-hot activity
    degree; flags (1 only where the value is 1: `is_live_streamer` says −124 for no); standardised log1p counts;
    one-hot anonymous codes, those with more than 16 values hashed to 16 buckets. What is missing is zeros.

    Args:
      users: `columns.read_users`.
      train_users: ids of the users of the training rows, on whom everything is fitted.
    """
    users = users.filter(pl.col("user_id").is_not_null()).sort("user_id")
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
        value, fitted[name] = _standardise(np.log1p(np.maximum(np.nan_to_num(counts), 0)), known, train)
        parts.append(value[:, None])
    for name in columns.USER_CODES:
        codes = users[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
        values = np.unique(codes[train & ~np.isnan(codes)])
        fitted[name] = values if len(values) <= MAX_ONE_HOT else np.empty(0)  # empty: hashed
        if len(values) <= MAX_ONE_HOT:
            parts.append(codes[:, None] == values)
        else:
            hashed = (np.nan_to_num(codes).astype(np.int64) * 2654435761 % 2**32) >> 28
            parts.append(_one_hot(np.where(np.isnan(codes), -1, hashed), MAX_ONE_HOT))
    values = np.concatenate(parts, axis=1).astype(np.float32)
    return Profiles(
        user_id=np.concatenate([[-1], user_id]).astype(np.int32),
        values=np.concatenate([np.zeros((1, values.shape[1]), np.float32), values]),
        fitted=fitted,
    )


def _lookup(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    order = np.argsort(table, kind="stable")
    place = np.minimum(np.searchsorted(table, ids, sorter=order), len(table) - 1)
    row = order[place]
    return np.where(table[row] == ids, row, 0).astype(np.int32)


def _with_unknown(column: pl.Series, fill) -> np.ndarray:
    """A table column as [V], with `fill` in row 0 and where it is null."""
    return np.concatenate([[fill], column.fill_null(fill).to_numpy()])


def _vocabulary(values: np.ndarray, in_train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted values (≥ 0) of the training videos, and for every video 1 + its place among them, or 0; int32."""
    vocabulary = np.unique(values[in_train & (values >= 0)])
    place = np.minimum(np.searchsorted(vocabulary, values), max(len(vocabulary) - 1, 0))
    known = vocabulary[place] == values if len(vocabulary) else np.zeros(len(values), bool)
    return vocabulary, np.where(known, place + 1, 0).astype(np.int32)


def _standardise(values: np.ndarray, known: np.ndarray, fit_on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values minus mean over standard deviation of the known `values[fit_on]`, 0 where unknown; and [mean, std]."""
    sample = values[fit_on][known[fit_on]]
    mean, std = (float(sample.mean()), float(sample.std())) if len(sample) else (0.0, 1.0)
    std = std if std > 1e-6 else 1.0
    return np.where(known, (values - mean) / std, 0.0), np.array([mean, std])


def _frequent(column: pl.Series, in_train: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent names among training videos, and each video's place: `size` for others, −1 for row 0."""
    names = np.concatenate([[""], column.fill_null("").to_numpy().astype(str)])
    values, counts = np.unique(names[in_train], return_counts=True)
    top = values[np.lexsort((values, -counts))][:size]
    match = names[:, None] == top
    place = np.where(match.any(1), match.argmax(1), size) if len(top) else np.full(len(names), size)
    place[0] = -1
    return top, place


def _one_hot(place: np.ndarray, size: int) -> np.ndarray:
    return place[:, None] == np.arange(size)


def _day_number(date: int) -> int:
    return datetime.date(date // 10000, date // 100 % 100, date % 100).toordinal()


def _day_numbers(dates: np.ndarray) -> np.ndarray:
    """Ordinal days of dates such as 20220409; 0 where there is none or it is no day."""
    values, inverse = np.unique(dates, return_inverse=True)

    def day(date: int) -> int:
        try:
            return _day_number(date)
        except ValueError:
            return 0

    return np.array([day(int(value)) for value in values])[inverse]
