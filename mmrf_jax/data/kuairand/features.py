"""What is known of videos and users: vocabularies, features and the days on which a video can be a candidate.

Everything that is fitted — vocabularies, normalisers, buckets — is fitted on the standard-log rows of the training days
only. `video_features_statistic` is never read: its averages are over the whole month, test days included.
"""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
from typing import Any

import numpy as np
import polars as pl

from mmrf_jax import types
from mmrf_jax.data.kuairand import columns
from mmrf_jax.data.kuairand.clean import NEVER

DURATION_BUCKETS = 8
VIDEO_TYPES, UPLOAD_TYPES = 3, 8
MAX_ONE_HOT = 16
SLICE = 1 << 16  # videos of which features are held at a time


@dataclasses.dataclass
class Catalogue:
    """All videos of the feature files and logs; row 0 is an unknown video.

    Rows are ordered by video id where the feature file has the video, then by first day in the logs, so that no row
    of an earlier day moves when later days change. Arrays may be read-only maps of files (`read_catalogue`).
    """

    video_id: np.ndarray  # [V] int32 of KuaiRand, −1 in row 0
    first_id: np.ndarray  # [] int32, the least id
    row_of: np.ndarray  # [ids] int32, the row of each id from the least to the largest; 0 where there is none
    items: types.Items  # of NumPy arrays, [V]
    live_from: np.ndarray  # [V] int32, first day on which it may be a candidate, or NEVER
    random_from: np.ndarray  # [V] int32, the day after its first random exposure, or NEVER
    fitted: dict[str, np.ndarray]  # vocabularies and normalisers, for inspection and tests

    def rows_of(self, video_id: np.ndarray) -> np.ndarray:
        """Item rows of KuaiRand video ids, int32; 0 where unknown."""
        place = video_id - np.int64(self.first_id)
        inside = (place >= 0) & (place < len(self.row_of))
        if inside.all():
            return np.take(self.row_of, place)
        return np.where(inside, self.row_of[np.where(inside, place, 0)], 0)


def read_catalogue(folder: pathlib.Path) -> Catalogue:
    """What `build_catalogue` wrote; large arrays are mapped, not read."""
    arrays, fitted = _read_arrays(folder)
    fields = {f.name: arrays.pop(f"items-{f.name}") for f in dataclasses.fields(types.Items)}
    known: dict[str, Any] = {name: value if value.ndim else int(value) for name, value in fields.items()}
    items = types.Items(**known)
    return Catalogue(items=items, fitted=fitted, **arrays)


def build_catalogue(told: pl.DataFrame, videos: pl.DataFrame, train_until: int, folder: pathlib.Path) -> None:
    """Item table, vocabularies and live days, written to `folder` as one npy file an array (`read_catalogue`).

    Item features [V, Di], Di = 1 + 8 + 4 + 9 + 1: standardised log duration; one-hot bucket of duration (quantiles of
    the training rows); one-hot of the video type and of the upload type (the frequent ones of training videos, then
    other); standardised log1p of the days from upload to `train_until`, at least 0. What is missing is zeros.

    Args:
      told: what the logs say of videos (`clean.fold_videos`).
      videos: `columns.merge_videos`.
      train_until: last training day.
    """
    table = _Table(told, videos)
    save = lambda name, value: np.save(folder / f"{name}.npy", value)
    save("video_id", table.video_id)
    ids = table.video_id[1:]
    save("first_id", ids.min())
    # of ids with gaps, the file has holes
    row_of = np.lib.format.open_memmap(folder / "row_of.npy", "w+", np.int32, (int(ids.max()) - int(ids.min()) + 1,))
    row_of[ids - np.int64(ids.min())] = np.arange(1, table.size, dtype=np.int32)
    row_of.flush()
    del ids, row_of
    train = table.told("train", 0)
    in_train = train > 0
    fit_on, weight = np.flatnonzero(in_train), train[in_train]
    fitted = {}
    fitted["video_vocabulary"], embedding_id = _vocabulary(table.video_id, in_train)
    save("items-embedding_id", embedding_id)
    del embedding_id, train
    fitted["author_vocabulary"], author = _vocabulary(table.featured("author_id", -1), in_train)
    save("items-author", author)
    fitted["tag_vocabulary"], tag = _vocabulary(table.featured("tag", -1), in_train)
    save("items-tag", tag)
    del author, tag
    for name in ("video", "author", "tag"):
        save(f"items-num_{'embedding' if name == 'video' else name}s", len(fitted[f"{name}_vocabulary"]) + 1)

    seen, upload, duration = (
        table.told("seen", NEVER),
        table.featured("upload_dt", -1),
        table.featured("duration_ms", 0),
    )
    following = np.where(seen < NEVER, seen + 1, NEVER)
    live_from = np.maximum(np.where(upload < 0, following, upload), np.where(duration > 0, 0, following))
    live_from[0] = NEVER
    save("live_from", live_from.astype(np.int32))
    random = table.told("random", NEVER)
    save("random_from", np.where(random < NEVER, random + 1, NEVER).astype(np.int32))
    del seen, following, live_from, random
    seconds = np.where(duration > 0, duration, table.told("seen_ms", 0)) / 1000
    del duration
    save("items-duration", seconds.astype(np.float32))

    last_day = _day_number(train_until)
    log_seconds = lambda rows: np.log(np.maximum(seconds[rows], 0.1))
    log_age = lambda rows: np.log1p(np.maximum(last_day - _day_numbers(np.maximum(upload[rows], 0)), 0))
    uploaded = lambda rows: _day_numbers(np.maximum(upload[rows], 0)) > 0
    fitted["log_duration_mean_std"] = _mean_std(log_seconds(fit_on), weight * (seconds[fit_on] > 0))
    fitted["log_age_mean_std"] = _mean_std(log_age(fit_on), weight * uploaded(fit_on))
    edges = _quantiles(seconds[fit_on], weight, np.arange(1, DURATION_BUCKETS) / DURATION_BUCKETS)
    fitted["duration_edges"] = edges
    fitted["video_types"], video_type = _frequent(table.featured_names("video_type"), in_train, VIDEO_TYPES)
    fitted["upload_types"], upload_type = _frequent(table.featured_names("upload_type"), in_train, UPLOAD_TYPES)
    features = np.lib.format.open_memmap(
        folder / "items-features.npy",
        "w+",
        np.float32,
        (table.size, 2 + DURATION_BUCKETS + VIDEO_TYPES + UPLOAD_TYPES + 2),
    )
    for start in range(0, table.size, SLICE):
        rows = slice(start, start + SLICE)
        known = seconds[rows] > 0
        bucket = np.where(known, np.searchsorted(edges, seconds[rows], side="right"), -1)
        features[rows] = np.concatenate(
            [
                _standardise(log_seconds(rows), known, fitted["log_duration_mean_std"])[:, None],
                _one_hot(bucket, DURATION_BUCKETS),
                _one_hot(video_type[rows], VIDEO_TYPES + 1),
                _one_hot(upload_type[rows], UPLOAD_TYPES + 1),
                _standardise(log_age(rows), uploaded(rows), fitted["log_age_mean_std"])[:, None],
            ],
            axis=1,
            dtype=np.float32,
        )
    features.flush()
    for name, value in fitted.items():
        save(f"fitted-{name}", value)


class _Table:
    """Columns [V] of the item table from what features and logs say of videos, row 0 the unknown one.

    `told` is sorted by its different video ids and so is `videos`.
    """

    def __init__(self, told: pl.DataFrame, videos: pl.DataFrame):
        self._told, self._videos = told, videos
        featured, ids = videos["video_id"].to_numpy(), told["video_id"].to_numpy()
        place = np.searchsorted(featured, ids)
        listed = np.zeros(len(ids), bool)
        if len(featured):
            listed = featured[np.minimum(place, len(featured) - 1)] == ids
        seen = told["seen"].to_numpy()
        others = np.flatnonzero(~listed & (seen < NEVER))
        self._others = others[np.lexsort((ids[others], seen[others]))]
        self._row = np.where(listed, place + 1, 0).astype(np.int32)
        self._row[self._others] = 1 + len(featured) + np.arange(len(others))
        self.video_id = np.concatenate([[-1], featured, ids[self._others]]).astype(np.int32)
        self.size = len(self.video_id)

    def featured(self, name: str, fill: int) -> np.ndarray:
        """A column of the features, `fill` where there is none."""
        values = self._videos[name].fill_null(fill).to_numpy()
        out = np.full(self.size, fill, values.dtype)
        out[1 : 1 + len(values)] = values
        return out

    def featured_names(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The different names of a column, sorted and led by "" for none, and each row's place among them."""
        column = self._videos[name].fill_null("")
        names = np.array(sorted({"", *column.unique()}))
        out = np.zeros(self.size, np.uint32)
        out[1 : 1 + len(column)] = column.cast(pl.Enum(names.tolist())).to_physical().to_numpy()
        return names, out

    def told(self, name: str, fill: int) -> np.ndarray:
        """A column of what the logs say, `fill` for videos that they do not have."""
        values = self._told[name].to_numpy()
        out = np.full(self.size, fill, values.dtype)
        out[self._row] = values
        out[0] = fill
        return out


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
        row = np.minimum(np.searchsorted(self.user_id, user_id), len(self.user_id) - 1)
        return np.where(self.user_id[row] == user_id, row, 0).astype(np.int32)


def write_profiles(profiles: Profiles, folder: pathlib.Path) -> None:
    """One npy file an array; see `read_profiles`."""
    for name, value in {"user_id": profiles.user_id, "values": profiles.values}.items():
        np.save(folder / f"{name}.npy", value)
    for name, value in profiles.fitted.items():
        np.save(folder / f"fitted-{name}.npy", value)


def read_profiles(folder: pathlib.Path) -> Profiles:
    """What `write_profiles` wrote; arrays are mapped, not read."""
    arrays, fitted = _read_arrays(folder)
    return Profiles(fitted=fitted, **arrays)


def _read_arrays(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The arrays of a folder by name, those `fitted` apart."""
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("[!.]*.npy")}
    fitted = {name[7:]: arrays.pop(name) for name in list(arrays) if name.startswith("fitted-")}
    return arrays, fitted


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
        value = np.log1p(np.maximum(np.nan_to_num(counts), 0))
        fitted[name] = _mean_std(value, (known & train).astype(np.int64))
        parts.append(_standardise(value, known, fitted[name])[:, None])
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


def _vocabulary(values: np.ndarray, in_train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted values (≥ 0) of the training videos, and for every video 1 + its place among them, or 0; int32."""
    vocabulary = np.sort(values[in_train & (values >= 0)])
    vocabulary = vocabulary[np.diff(vocabulary, prepend=-1) > 0]
    place = np.minimum(np.searchsorted(vocabulary, values), max(len(vocabulary) - 1, 0))
    known = vocabulary[place] == values if len(vocabulary) else np.zeros(len(values), bool)
    return vocabulary, np.where(known, place + 1, 0).astype(np.int32)


def _mean_std(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[mean, standard deviation] of values [n], counted `weight` [n] times each; 0, 1 of none, 1 for no deviation."""
    values, weight = values[weight > 0], weight[weight > 0]
    if not len(values):
        return np.array([0.0, 1.0])
    mean = np.average(values, weights=weight)
    std = np.sqrt(np.average((values - mean) ** 2, weights=weight))
    return np.array([mean, std if std > 1e-6 else 1.0])


def _standardise(values: np.ndarray, known: np.ndarray, mean_std: np.ndarray) -> np.ndarray:
    """Values minus mean over standard deviation, 0 where unknown."""
    return np.where(known, (values - mean_std[0]) / mean_std[1], 0.0)


def _quantiles(values: np.ndarray, weight: np.ndarray, at: np.ndarray) -> np.ndarray:
    """`np.quantile` of values [n], each repeated `weight` [n] times."""
    order = np.argsort(values, kind="stable")
    last = np.cumsum(weight[order])
    rank = at * (last[-1] - 1)
    nth = lambda k: values[order[np.searchsorted(last, k, side="right")]]
    low, high = nth(np.floor(rank)), nth(np.ceil(rank))
    return low + (high - low) * (rank - np.floor(rank))


def _frequent(coded: tuple[np.ndarray, np.ndarray], in_train: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent names among training videos, and each video's place: `size` for others, −1 for row 0."""
    names, code = coded
    counts = np.bincount(code[in_train], minlength=len(names))
    by_count = np.lexsort((names, -counts))
    top = by_count[counts[by_count] > 0][:size]
    place_of = np.full(len(names), size)
    place_of[top] = np.arange(len(top))
    place = place_of[code]
    place[0] = -1
    return names[top], place


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
