"""Features of videos and users: the item catalogue, user profiles, and how both are fitted and encoded.

Everything that is fitted — vocabularies, normalisers, buckets — is fitted on the standard-log rows of the training days
only, and on their users. `video_features_statistic` is never read: its averages cover the whole month, including test
days.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import polars as pl

from mmrf_jax import types
from mmrf_jax.data.readers.engine import tasks
from mmrf_jax.data.readers.engine.grouping import order_of
from mmrf_jax.data.readers.kuairand import csv_files
from mmrf_jax.data.readers.kuairand.clean import NEVER, day_number

DURATION_BUCKETS = 8
VIDEO_TYPES, UPLOAD_TYPES = 3, 8
SLICE = 1 << 16  # number of videos whose features are in memory at a time
MAX_ONE_HOT = 16


@dataclasses.dataclass
class Catalogue:
    """All videos of the feature files and logs; row 0 is an unknown video.

    Rows are ordered by video id if the feature file has the video, then by first day in the logs, so changes on later
    days do not move rows of earlier days. Arrays may be read-only memory maps (`read_catalogue`).
    """

    video_id: np.ndarray  # [V] int32 of KuaiRand, −1 in row 0; int64 if ids are too large for int32
    first_id: np.ndarray  # [] the smallest id
    row_of: np.ndarray  # [ids] int32 row of each id from the smallest to the largest, 0 for none; or
    sorted_id: np.ndarray | None  # [V − 1] int64, if that would be too large: all ids, whose rows are `row_of`
    items: types.Items  # of NumPy arrays, [V]
    live_from: np.ndarray  # [V] int32, first day on which it may be a candidate, or NEVER
    random_from: np.ndarray  # [V] int32, the day after its first random exposure, or NEVER
    fitted: dict[str, np.ndarray]  # vocabularies and normalisers, for inspection and tests

    def rows_of(self, video_id: np.ndarray) -> np.ndarray:
        """Return item rows of KuaiRand video ids, int32; 0 for unknown ids."""
        if self.sorted_id is not None:
            place = np.minimum(np.searchsorted(self.sorted_id, video_id), len(self.sorted_id) - 1)
            return np.where(self.sorted_id[place] == video_id, self.row_of[place], 0)
        place = video_id - np.int64(self.first_id)
        inside = (place >= 0) & (place < len(self.row_of))
        if inside.all():
            return np.take(self.row_of, place)
        return np.where(inside, self.row_of[np.where(inside, place, 0)], 0)


def read_catalogue(folder: pathlib.Path) -> Catalogue:
    """Read the output of `build_catalogue`; large arrays are memory-mapped."""
    arrays, fitted = read_arrays(folder)
    names = [f.name for f in dataclasses.fields(types.Items) if f.name not in ("dates", "statistics")]
    fields = {name: arrays.pop(f"items-{name}") for name in names}
    known: dict[str, Any] = {name: value if value.ndim else int(value) for name, value in fields.items()}
    items = types.Items(**known)
    return Catalogue(items=items, fitted=fitted, sorted_id=arrays.pop("sorted_id", None), **arrays)


def build_catalogue(
    facts: Sequence[pathlib.Path], videos: Sequence[pathlib.Path], train_until: int, folder: pathlib.Path
) -> None:
    """Write the item table, vocabularies and live days to `folder`, one npy file per array (`read_catalogue`).

    Item features [V, Di], Di = 1 + 8 + 4 + 9 + 1: standardised log duration; one-hot bucket of duration (quantiles of
    the training rows); one-hot of the video type and of the upload type (the frequent ones of training videos, then
    other); standardised log1p of the days from upload to `train_until`, at least 0. Missing values are zeros.

    Args:
      facts: files with the logs' facts about videos (`clean.fold_videos`), sorted by video id across files.
      videos: files of video features (`csv_files.read_videos`), sorted likewise, each video once.
      train_until: last training day.
      folder: folder to write to.
    """
    # Releases have up to 32 million videos: columns are read on demand, and few are in memory at a time.
    table = _Table(facts, videos)
    _write_ids(table, folder)
    _write_days(table, folder)
    _write_vocabularies(table, table.facts("train", 0) > 0, folder)
    _write_features(table, train_until, folder)


def _write_ids(table: _Table, folder: pathlib.Path) -> None:
    first, last = int(table.video_id[1:].min()), int(table.video_id[1:].max())
    if table.video_id.dtype == np.int32:
        # A sparse file if ids have gaps.
        row_of = np.lib.format.open_memmap(folder / "row_of.npy", "w+", np.int32, (last - first + 1,))
        row_of[table.video_id[1:] - np.int64(first)] = np.arange(1, table.size, dtype=np.int32)
        row_of.flush()
    else:
        order = np.argsort(table.video_id[1:], kind="stable")
        np.save(folder / "row_of.npy", (1 + order).astype(np.int32))
        np.save(folder / "sorted_id.npy", table.video_id[1:][order])
    np.save(folder / "first_id.npy", first)
    np.save(folder / "video_id.npy", table.video_id)


def _write_days(table: _Table, folder: pathlib.Path) -> None:
    seen, random = table.facts("seen", NEVER), table.facts("random", NEVER)
    following = np.where(seen < NEVER, seen + 1, NEVER)
    upload = table.featured("upload_dt", -1)
    live_from = np.where(upload < 0, following, upload)
    live_from = np.maximum(live_from, np.where(table.featured("duration_ms", 0) > 0, 0, following))
    live_from[0] = NEVER
    np.save(folder / "live_from.npy", live_from.astype(np.int32))
    np.save(folder / "random_from.npy", np.where(random < NEVER, random + 1, NEVER).astype(np.int32))


def _write_vocabularies(table: _Table, in_train: np.ndarray, folder: pathlib.Path) -> None:
    for name, field, values in (
        ("video", "embedding_id", lambda: table.video_id),
        ("author", "author", lambda: table.featured("author_id", -1)),
        ("tag", "tag", lambda: table.featured("tag", -1)),
    ):
        vocabulary, place = fit_vocabulary(values(), in_train)
        np.save(folder / f"fitted-{name}_vocabulary.npy", vocabulary)
        np.save(folder / f"items-{field}.npy", place)
        counted = "embedding" if name == "video" else name
        np.save(folder / f"items-num_{counted}s.npy", len(vocabulary) + 1)


def _write_features(table: _Table, train_until: int, folder: pathlib.Path) -> None:
    duration, upload = table.featured("duration_ms", 0), np.maximum(table.featured("upload_dt", 0), 0)
    seconds = np.where(duration > 0, duration, table.facts("seen_ms", 0)) / 1000
    del duration
    np.save(folder / "items-duration.npy", seconds.astype(np.float32))
    train = table.facts("train", 0)
    in_train, weight = train > 0, train[train > 0]
    del train
    last_day = day_number(train_until)

    def log_seconds(rows):
        return np.log(np.maximum(seconds[rows], 0.1))

    def uploaded(rows):
        return day_numbers(upload[rows])

    def log_age(day):
        return np.log1p(np.maximum(last_day - day, 0))

    edges = quantiles(seconds[in_train], weight, np.arange(1, DURATION_BUCKETS) / DURATION_BUCKETS)
    of_seconds = mean_std(log_seconds(in_train), weight * (seconds[in_train] > 0))
    of_age = mean_std(log_age(uploaded(in_train)), weight * (uploaded(in_train) > 0))
    video_types, video_type = frequent(*table.featured_names("video_type"), in_train, VIDEO_TYPES)
    upload_types, upload_type = frequent(*table.featured_names("upload_type"), in_train, UPLOAD_TYPES)
    fitted = {
        "duration_edges": edges,
        "log_duration_mean_std": of_seconds,
        "log_age_mean_std": of_age,
        "video_types": video_types,
        "upload_types": upload_types,
    }
    for name, value in fitted.items():
        np.save(folder / f"fitted-{name}.npy", value)
    width = 1 + DURATION_BUCKETS + (VIDEO_TYPES + 1) + (UPLOAD_TYPES + 1) + 1
    with open(folder / "items-features.npy", "wb") as f:  # written by slices; a map of the file would count as memory
        header = {"descr": "<f4", "fortran_order": False, "shape": (table.size, width)}
        np.lib.format.write_array_header_1_0(f, header)

        def block(start: int) -> np.ndarray:
            rows = slice(start, start + SLICE)
            known, day = seconds[rows] > 0, uploaded(rows)
            bucket = np.where(known, np.searchsorted(edges, seconds[rows], side="right"), -1)
            columns = [
                standardise(log_seconds(rows), known, of_seconds)[:, None],
                one_hot(bucket, DURATION_BUCKETS),
                one_hot(video_type[rows], VIDEO_TYPES + 1),
                one_hot(upload_type[rows], UPLOAD_TYPES + 1),
                standardise(log_age(day), day > 0, of_age)[:, None],
            ]
            return np.concatenate(columns, axis=1, dtype=np.float32)

        starts = range(0, table.size, SLICE)
        with ThreadPoolExecutor(2) as threads:
            for i in range(0, len(starts), 2):  # a few at a time, since writing is slower than computing
                for made in threads.map(block, starts[i : i + 2]):
                    made.tofile(f)


class _Table:
    """Columns [V] of the item table, from features and logs; row 0 is the unknown video."""

    def __init__(self, facts: Sequence[pathlib.Path], videos: Sequence[pathlib.Path]):
        """Read the ids; arguments as for `build_catalogue`."""
        self._told, self._videos = facts, videos
        featured = tasks.read_column(videos, "video_id").to_numpy()
        ids, seen = (tasks.read_column(facts, name).to_numpy() for name in ("video_id", "seen"))
        place = np.searchsorted(featured, ids)
        listed = np.zeros(len(ids), bool)
        if len(featured):
            listed = featured[np.minimum(place, len(featured) - 1)] == ids
        others = np.flatnonzero(~listed & (seen < NEVER))
        others = others[order_of(seen[others], ids[others])]
        self._row = np.where(listed, place + 1, 0).astype(np.int32)
        self._row[others] = 1 + len(featured) + np.arange(len(others))
        self.video_id = np.concatenate([[-1], featured, ids[others]], dtype=np.result_type(featured, ids))
        self.size = len(self.video_id)

    def featured(self, name: str, fill: int) -> np.ndarray:
        """Return a column of the features, with `fill` for missing values."""
        values = tasks.read_column(self._videos, name).fill_null(fill).to_numpy()
        out = np.full(self.size, fill, values.dtype)
        out[1 : 1 + len(values)] = values
        return out

    def featured_names(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the sorted distinct names of a column, "" for missing included, and each row's index among them."""
        column = tasks.read_column(self._videos, name).fill_null("")
        names = np.array(sorted({"", *column.unique()}))
        out = np.zeros(self.size, np.uint32)
        out[1 : 1 + len(column)] = column.cast(pl.Enum(names.tolist())).to_physical().to_numpy()
        return names, out

    def facts(self, name: str, fill: int) -> np.ndarray:
        """Return a column of the logs' facts, with `fill` for videos not in the logs."""
        values = tasks.read_column(self._told, name).to_numpy()
        out = np.full(self.size, fill, values.dtype)
        out[self._row] = values
        out[0] = fill
        return out


@dataclasses.dataclass
class Profiles:
    """User features by user id; users without any have zeros."""

    user_id: np.ndarray  # [U + 1] int32, or int64 if ids are too large for it; −1 in row 0
    values: np.ndarray  # [U + 1, Du] float32, zeros in row 0
    fitted: dict[str, np.ndarray]

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
    arrays, fitted = read_arrays(folder)
    return Profiles(fitted=fitted, **arrays)


def build_profiles(users: pl.DataFrame, train_users: np.ndarray) -> Profiles:
    """Build the user profiles [U + 1, Du].

    KuaiRand releases user features as one snapshot, not day by day; they are used unchanged. One-hot activity degree;
    flags (1 only if the value is 1: `is_live_streamer` has −124 for no); standardised log1p counts; one-hot anonymous
    codes, those with more than 16 values hashed to 16 buckets. Missing values are zeros.

    Args:
      users: the rows of `csv_files.read_users`; of rows with the same user the first counts.
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
    parts += [(users[name].to_numpy() == 1)[:, None] for name in csv_files.USER_FLAGS]
    for name in csv_files.USER_COUNTS:
        counts = users[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
        known = ~np.isnan(counts)
        value = np.log1p(np.maximum(np.nan_to_num(counts), 0))
        fitted[name] = mean_std(value, (known & train).astype(np.int64))
        parts.append(standardise(value, known, fitted[name])[:, None])
    for name in csv_files.USER_CODES:
        codes = users[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
        values = np.unique(codes[train & ~np.isnan(codes)])
        fitted[name] = values if len(values) <= MAX_ONE_HOT else np.empty(0)  # empty: hashed
        if len(values) <= MAX_ONE_HOT:
            parts.append(codes[:, None] == values)
        else:
            hashed = (np.nan_to_num(codes).astype(np.int64) * 2654435761 % 2**32) >> 28
            parts.append(one_hot(np.where(np.isnan(codes), -1, hashed), MAX_ONE_HOT))
    values = np.concatenate(parts, axis=1).astype(np.float32)
    return Profiles(
        user_id=np.concatenate([[-1], user_id]).astype(user_id.dtype),
        values=np.concatenate([np.zeros((1, values.shape[1]), np.float32), values]),
        fitted=fitted,
    )


def read_arrays(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Read the arrays of a folder by name; the `fitted` ones are returned separately."""
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("[!.]*.npy")}
    fitted = {name[7:]: arrays.pop(name) for name in list(arrays) if name.startswith("fitted-")}
    return arrays, fitted


def fit_vocabulary(values: np.ndarray, in_train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted values (≥ 0) of training videos, and for every video 1 + its index among them, or 0; int32."""
    # Sorting the values takes a quarter of the time of searching each.
    order = order_of(values)
    ordered = values[order]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    known = np.logical_or.reduceat(in_train[order], first) & (ordered[first] >= 0)
    place = np.empty(len(values), np.int32)
    place[order] = np.repeat(np.where(known, np.cumsum(known, dtype=np.int32), 0), np.diff(first, append=len(values)))
    return ordered[first[known]], place


def mean_std(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return [mean, standard deviation] of values [n] with weights [n]: 0, 1 for no values; 1 for no deviation."""
    values, weight = values[weight > 0], weight[weight > 0]
    if not len(values):
        return np.array([0.0, 1.0])
    mean = np.average(values, weights=weight)
    std = np.sqrt(np.average((values - mean) ** 2, weights=weight))
    return np.array([mean, std if std > 1e-6 else 1.0])


def standardise(values: np.ndarray, known: np.ndarray, mean_std: np.ndarray) -> np.ndarray:
    """Return values minus mean, over standard deviation; 0 for unknown values."""
    return np.where(known, (values - mean_std[0]) / mean_std[1], 0.0)


def quantiles(values: np.ndarray, weight: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return `np.quantile` of values [n], each repeated `weight` [n] times."""
    order = np.argsort(values, kind="stable")
    last = np.cumsum(weight[order])
    rank = at * (last[-1] - 1)

    def nth(k):
        return values[order[np.searchsorted(last, k, side="right")]]

    low, high = nth(np.floor(rank)), nth(np.ceil(rank))
    return low + (high - low) * (rank - np.floor(rank))


def frequent(names: np.ndarray, code: np.ndarray, in_train: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the most frequent names among training videos, and each video's index: `size` for others, −1 for row 0.

    `code` [V] are indices in `names`.
    """
    counts = np.bincount(code[in_train], minlength=len(names))
    by_count = np.lexsort((names, -counts))
    top = by_count[counts[by_count] > 0][:size]
    place_of = np.full(len(names), size, np.int16)  # for up to 32 million videos
    place_of[top] = np.arange(len(top))
    place = place_of[code]
    place[0] = -1
    return names[top], place


def one_hot(place: np.ndarray, size: int) -> np.ndarray:
    return place[:, None] == np.arange(size)


def day_numbers(dates: np.ndarray) -> np.ndarray:
    """Return ordinal days of dates such as 20220409; 0 for missing or invalid dates."""
    values, inverse = np.unique(dates, return_inverse=True)

    def day(date: int) -> int:
        try:
            return day_number(date)
        except ValueError:
            return 0

    return np.array([day(int(value)) for value in values])[inverse]
