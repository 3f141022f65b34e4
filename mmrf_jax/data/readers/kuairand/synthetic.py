"""Synthetic logs of any size in KuaiRand's official layout, for benchmarks and tests; they model no real behaviour.

Sizes, dates, rates and quantiles are close to those of the real logs. The random draws of a piece of the log depend
only on the seed and the piece, and only one piece is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import polars as pl

from mmrf_jax.data.readers.kuairand import csv_files
from mmrf_jax.io import files, storage

#: Users, videos and random rows per standard row of the releases.
OFFICIAL = {"pure": (27_285, 7_583, 0.8255), "1k": (1_000, 4_369_953, 0.0037), "27k": (27_285, 32_038_725, 0.0037)}
#: Rows of the releases' standard logs, and rows per user of Pure's.
OFFICIAL_ROWS = {"pure": 1_436_609, "1k": 11_713_045, "27k": 322_278_385}
ROWS_PER_USER = 50
#: Minimum sizes of a short log, so that each request finds its candidates.
FEWEST_VIDEOS, FEWEST_RANDOM_ROWS = 300, 600
FIRST_DAY, DAYS = datetime.date(2022, 4, 8), 31
SECOND_PERIOD = 14  # days before 22 April, when the second files and the random log begin
RANDOM_POOL = 7_583
PIECE_ROWS = 500_000
ROWS_PER_SESSION = 40
DAY_MS = 24 * 3_600_000
RATES = {
    "is_like": 0.0175,
    "is_follow": 0.0013,
    "is_comment": 0.0026,
    "is_forward": 0.0008,
    "is_hate": 0.00085,
    "is_profile_enter": 0.0189,
}
LOG_COLUMNS = (
    *("user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment"),
    *("is_forward", "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time"),
    *("is_profile_enter", "is_rand", "tab"),
)


@dataclasses.dataclass(frozen=True)
class SyntheticLog:
    """Size and seed of a synthetic log.

    Attributes:
      rows: rows of the standard log; those of the random log follow from its share in the release, at least some
        hundred.
      users, videos: None for the number that `rows` rows of the release have, at most its total.
      variant: `pure`, `1k` or `27k`, whose files come in parts.
      seed: seed of all random draws.

    Raises:
      ValueError: for an unknown variant, or a size below 1.
    """

    rows: int
    users: int | None = None
    videos: int | None = None
    variant: str = "27k"
    seed: int = 0

    def __post_init__(self):
        if self.variant not in OFFICIAL:
            raise ValueError(f"variant={self.variant!r} is no release of KuaiRand; use one of {', '.join(OFFICIAL)}")
        for name in ("rows", "users", "videos"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} is not positive; set it to 1 or more")

    def write(
        self,
        directory: str | os.PathLike,
        progress: Callable[[str, int], Callable[[int], None]],
        layout: str = "kuairand",
    ) -> None:
        """Write the log to a folder that appears atomically.

        Args:
          directory: folder to create.
          progress: as `io.progress.counted`; counts rows of log and features.
          layout: `kuairand` writes `data`/*.csv; `tables` writes the same standard log as Parquet files in the folders
            `log`, `items` and `users`, and `schema.py`, for the config `logs`.

        Raises:
          FileExistsError: if the directory exists.
        """
        directory = storage.path(directory)
        if directory.exists():
            raise FileExistsError(f"{directory} exists; remove it or name another directory")
        with files.new_folder(directory) as folder:
            update, done = progress("synthesize", self._total), 0
            for number, (name, frame) in enumerate(self._frames()):
                (_write_csv if layout == "kuairand" else _write_table)(folder, name, number, frame)
                update(done := done + len(frame))
            if layout == "tables":
                (folder / "schema.py").write_text(_SCHEMA)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        users, videos, share = OFFICIAL[self.variant]
        users = min(users, max(1, self.rows // ROWS_PER_USER))
        videos = min(videos, max(FEWEST_VIDEOS, videos * self.rows // OFFICIAL_ROWS[self.variant]))
        random_rows = max(1, round(self.rows * share), min(self.rows, FEWEST_RANDOM_ROWS))
        return self.users or users, self.videos or videos, random_rows

    @property
    def _total(self) -> int:
        users, videos, random_rows = self._sizes
        return users + videos + self.rows + random_rows

    def _frames(self) -> Iterator[tuple[str, pl.DataFrame]]:
        users, videos, random_rows = self._sizes
        yield f"user_features_{self.variant}.csv", _users(self._rng(0), users)
        duration, old = _durations(self._rng(1), videos), max(1, round(0.7 * videos))
        for first in range(0, videos, PIECE_ROWS):
            ids = np.arange(first, min(first + PIECE_ROWS, videos))
            yield f"video_features_basic_{self.variant}.csv", _videos(self._rng(2, first), ids, duration, old)
        activity = np.cumsum(self._rng(3).lognormal(sigma=1.0, size=users))
        for day, (first, end) in enumerate(_shares(self.rows, DAYS)):
            live = old + (videos - old) * day // DAYS
            for start in range(first, end, PIECE_ROWS):
                n = min(PIECE_ROWS, end - start)
                yield (
                    self._file("standard", day),
                    _exposures(self._rng(4, start), n, day, activity, duration, live, 0),
                )
        pool = min(RANDOM_POOL, old)
        for day, (first, end) in enumerate(_shares(random_rows, DAYS - SECOND_PERIOD), SECOND_PERIOD):
            for start in range(first, end, PIECE_ROWS):
                n = min(PIECE_ROWS, end - start)
                yield self._file("random", day), _exposures(self._rng(5, start), n, day, activity, duration, pool, 1)

    def _rng(self, *parts: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *parts])

    def _file(self, kind: str, day: int) -> str:
        """Return the file of a day; 27K's standard log has two parts per period."""
        period = "4_22_to_5_08" if day >= SECOND_PERIOD else "4_08_to_4_21"
        second_half = day % SECOND_PERIOD >= SECOND_PERIOD // 2 or day >= 2 * SECOND_PERIOD
        part = f"_part{1 + second_half}" if self.variant == "27k" and kind == "standard" else ""
        return f"log_{kind}_{period}_{self.variant}{part}.csv"


#: Of `SyntheticLog.write(layout="tables")`.
_SCHEMA = """from mmrf_jax import Schema, Signal

schema = Schema(
    user="user_id",
    item="video_id",
    time="time_ms",
    duration="duration_ms",
    signals=[
        *(Signal(name, f"is_{name}") for name in ("click", "like", "follow", "comment", "forward")),
        Signal("hate", "is_hate", sign=-1),
        Signal("long_view", "long_view"),
        Signal("watch_time", "play_time_ms", "duration", unit="ms"),
    ],
    main="watch_time",
    author="author_id",
    tag="tag",
    time_zone="Asia/Shanghai",
    split=("2022-05-02", "2022-05-03"),
    slate_size=6,
    num_candidates=100,
)
"""
_TABLES = {"log_standard": "log", "user_features": "users", "video_features": "items"}


def _write_csv(folder: pathlib.Path, name: str, number: int, frame: pl.DataFrame) -> None:
    del number
    (folder / "data").mkdir(exist_ok=True)
    with open(folder / "data" / name, "ab") as f:
        frame.write_csv(f, include_header=not f.tell())


def _write_table(folder: pathlib.Path, name: str, number: int, frame: pl.DataFrame) -> None:
    table = next((table for start, table in _TABLES.items() if name.startswith(start)), None)
    if table is not None:
        (folder / table).mkdir(exist_ok=True)
        columns = ("video_id", "author_id", "video_type", "upload_dt", "upload_type", "tag")
        frame = frame.select(columns) if table == "items" else frame
        frame.write_parquet(folder / table / f"{number:05d}.parquet")


def _shares(total: int, parts: int) -> list[tuple[int, int]]:
    edges = [total * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(edges))


def _durations(rng: np.random.Generator, videos: int) -> np.ndarray:
    """Draw durations [V] int32 in milliseconds, 0 if unknown; quartiles about 29, 71 and 173 s."""
    duration = (1000 * np.exp(4.26 + 1.32 * rng.standard_normal(videos, np.float32))).clip(3_000, 3_600_000)
    duration[rng.random(videos, np.float32) < 0.016] = 0
    return duration.astype(np.int32)


def _exposures(
    rng: np.random.Generator, n: int, day: int, activity: np.ndarray, duration: np.ndarray, live: int, is_rand: int
) -> pl.DataFrame:
    """Draw `n` rows of a day, sorted by user and time; one in 200 is an exact duplicate, as in the real logs.

    `activity` is the cumulative sum [U] of users' activity. The first `live` videos are shown, by Zipf's law in the
    standard log. A click is 7 s of play, or all of a shorter video; a long view 18 s, or all of a shorter one.
    """
    different = max(1, n - n // 200)
    sessions = max(1, different // ROWS_PER_SESSION)
    ends = np.sort(rng.integers(0, different + 1, sessions - 1))
    length = np.diff(ends, prepend=0, append=different).astype(np.int64)
    user = np.searchsorted(activity, rng.random(sessions) * activity[-1]).clip(max=len(activity) - 1)
    start = (DAY_MS * rng.beta(2.5, 1.5, sessions)).astype(np.int64)
    session = np.repeat(np.arange(sessions), length)
    uniform = rng.random(different)
    if is_rand:
        video = (uniform * live).astype(np.int64)
    else:  # ranks by Zipf's law of exponent 0.8, spread over the ids
        rank = np.minimum(((live**0.2 - 1) * uniform + 1) ** 5 - 1, live - 1).astype(np.int64)
        video = rank * 1_000_003 % live
    length_ms = duration[video]
    # About half as long in the random log.
    typical = 1.57 - 0.6 * is_rand
    play = (
        (1000 * np.exp(typical + 2.0 * rng.standard_normal(different, np.float32))).clip(max=900_000).astype(np.int32)
    )
    order = np.lexsort((start[session], user[session]))
    session, video, length_ms, play = session[order], video[order], length_ms[order], play[order]
    elapsed = np.cumsum(play.astype(np.int64) + 300)
    first = np.flatnonzero(np.diff(session, prepend=-1))
    before = np.repeat(elapsed[first] - play[first] - 300, np.diff(np.append(first, different)))
    time = start[session] + elapsed - before
    date = FIRST_DAY + datetime.timedelta(days=day)
    midnight = datetime.datetime.combine(date, datetime.time(), datetime.timezone(datetime.timedelta(hours=8)))
    chances = rng.random((len(RATES), different), np.float32)
    flags = {name: (chances[i] < rate).astype(np.int8) for i, (name, rate) in enumerate(RATES.items())}
    values = {
        "user_id": user[session].astype(np.int32),
        "video_id": video.astype(np.int32),
        "date": np.full(different, int(date.strftime("%Y%m%d")), np.int32),
        "hourmin": (time // 3_600_000 % 24 * 100).astype(np.int16),
        "time_ms": time + int(midnight.timestamp() * 1000),
        **flags,
        "is_click": np.where((length_ms > 0) & (length_ms <= 7_000), play >= length_ms, play > 7_000).astype(np.int8),
        "long_view": (play >= np.where(length_ms > 0, np.minimum(length_ms, 18_000), 18_000)).astype(np.int8),
        "play_time_ms": play,
        "duration_ms": length_ms,
        "profile_stay_time": np.where(flags["is_profile_enter"], play // 3, 0),
        "comment_stay_time": np.where(flags["is_comment"], play // 2, 0),
        "is_rand": np.full(different, is_rand, np.int8),
        "tab": rng.choice(np.array([1, 0, 4, 2, 6], np.int8), sessions, p=[0.75, 0.1, 0.08, 0.05, 0.02])[session],
    }
    frame = pl.DataFrame(values).select(LOG_COLUMNS)
    repeated = np.sort(np.concatenate([np.arange(different), rng.integers(0, different, n - different)]))
    return frame[repeated] if n > different else frame


def _users(rng: np.random.Generator, users: int) -> pl.DataFrame:
    values = {"user_id": np.arange(users)}
    values["user_active_degree"] = rng.choice(["full_active", "high_active", "middle_active", "UNKNOWN"], users)
    values["is_lowactive_period"] = np.zeros(users, np.int8)
    values["is_live_streamer"] = rng.choice([-124, 0, 1], users)
    values["is_video_author"] = rng.integers(0, 2, users)
    for name in csv_files.USER_COUNTS:
        values[name] = rng.lognormal(4, 2, users).astype(np.int64)
        values[f"{name}_range"] = np.full(users, "[0,10000)")
    sizes = (2, 7, 50, 1_471, 15, 34, 3, 118, 454, 7, 5, 6, 2, 2, 2, 2, 2, 2)
    values |= {name: rng.integers(0, size, users) for name, size in zip(csv_files.USER_CODES, sizes, strict=True)}
    return pl.DataFrame(values)


def _videos(rng: np.random.Generator, ids: np.ndarray, duration: np.ndarray, old: int) -> pl.DataFrame:
    """Draw features of videos `ids`; the first `old` predate the log, the others are uploaded day by day."""
    n, new = len(ids), max(len(duration) - old, 1)
    day = np.where(ids < old, -rng.integers(1, 60, n), (ids - old) * DAYS // new)
    upload = np.datetime64(FIRST_DAY) + day
    tags = rng.integers(1, 69, n).astype(str)
    known = duration[ids].astype(float)
    return pl.DataFrame(
        {
            "video_id": ids,
            "author_id": rng.integers(0, max(len(duration) // 2, 2), n),
            "video_type": np.where(rng.random(n) < 0.02, "AD", "NORMAL"),
            "upload_dt": upload.astype(str),
            "upload_type": rng.choice(["Web", "Kmovie", "LongImport", "ShortImport", "ShareFromOtherApp"], n),
            "visible_status": np.zeros(n),
            "video_duration": pl.Series(np.where(known > 0, known, np.nan)).fill_nan(None),
            "server_width": np.full(n, 720.0),
            "server_height": np.full(n, 1280.0),
            "music_id": rng.integers(0, 10**10, n),
            "music_type": np.full(n, 9.0),
            "tag": tags,
        }
    )
