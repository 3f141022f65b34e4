"""The items of KuaiRand: vocabularies, features and the days on which a video can be a candidate.

Everything that is fitted — vocabularies, normalisers, buckets — is fitted on the standard-log rows of the training days
only. `video_features_statistic` is never read: its averages cover the whole month, including test days.
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
from mmrf_jax.data.readers.kuairand import external, fits
from mmrf_jax.data.readers.kuairand.clean import NEVER

DURATION_BUCKETS = 8
VIDEO_TYPES, UPLOAD_TYPES = 3, 8
SLICE = 1 << 16  # number of videos whose features are in memory at a time


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
    arrays, fitted = fits.read_arrays(folder)
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
      videos: files of video features (`columns.read_videos`), sorted likewise, each video once.
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
        vocabulary, place = fits.vocabulary(values(), in_train)
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
    last_day = fits.day_number(train_until)

    def log_seconds(rows):
        return np.log(np.maximum(seconds[rows], 0.1))

    def uploaded(rows):
        return fits.day_numbers(upload[rows])

    def log_age(day):
        return np.log1p(np.maximum(last_day - day, 0))

    edges = fits.quantiles(seconds[in_train], weight, np.arange(1, DURATION_BUCKETS) / DURATION_BUCKETS)
    of_seconds = fits.mean_std(log_seconds(in_train), weight * (seconds[in_train] > 0))
    of_age = fits.mean_std(log_age(uploaded(in_train)), weight * (uploaded(in_train) > 0))
    video_types, video_type = fits.frequent(*table.featured_names("video_type"), in_train, VIDEO_TYPES)
    upload_types, upload_type = fits.frequent(*table.featured_names("upload_type"), in_train, UPLOAD_TYPES)
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
                fits.standardise(log_seconds(rows), known, of_seconds)[:, None],
                fits.one_hot(bucket, DURATION_BUCKETS),
                fits.one_hot(video_type[rows], VIDEO_TYPES + 1),
                fits.one_hot(upload_type[rows], UPLOAD_TYPES + 1),
                fits.standardise(log_age(day), day > 0, of_age)[:, None],
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
        featured = external.read_column(videos, "video_id").to_numpy()
        ids, seen = (external.read_column(facts, name).to_numpy() for name in ("video_id", "seen"))
        place = np.searchsorted(featured, ids)
        listed = np.zeros(len(ids), bool)
        if len(featured):
            listed = featured[np.minimum(place, len(featured) - 1)] == ids
        others = np.flatnonzero(~listed & (seen < NEVER))
        others = others[fits.order_of(seen[others], ids[others])]
        self._row = np.where(listed, place + 1, 0).astype(np.int32)
        self._row[others] = 1 + len(featured) + np.arange(len(others))
        self.video_id = np.concatenate([[-1], featured, ids[others]], dtype=np.result_type(featured, ids))
        self.size = len(self.video_id)

    def featured(self, name: str, fill: int) -> np.ndarray:
        """Return a column of the features, with `fill` for missing values."""
        values = external.read_column(self._videos, name).fill_null(fill).to_numpy()
        out = np.full(self.size, fill, values.dtype)
        out[1 : 1 + len(values)] = values
        return out

    def featured_names(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the sorted distinct names of a column, "" for missing included, and each row's index among them."""
        column = external.read_column(self._videos, name).fill_null("")
        names = np.array(sorted({"", *column.unique()}))
        out = np.zeros(self.size, np.uint32)
        out[1 : 1 + len(column)] = column.cast(pl.Enum(names.tolist())).to_physical().to_numpy()
        return names, out

    def facts(self, name: str, fill: int) -> np.ndarray:
        """Return a column of the logs' facts, with `fill` for videos not in the logs."""
        values = external.read_column(self._told, name).to_numpy()
        out = np.full(self.size, fill, values.dtype)
        out[self._row] = values
        out[0] = fill
        return out
