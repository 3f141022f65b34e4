"""A small made-up KuaiRand in the official file layout."""

from __future__ import annotations

import datetime
import pathlib

import numpy as np
import pandas as pd

from mmrf_jax import types
from mmrf_jax.data.readers import kuairand
from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.data.splits import PARTS

DATES = (20220429, 20220430, 20220501, 20220502, 20220503, 20220504, 20220505)
VIDEOS, USERS = 90, 14
FLAGS = ["is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"]
LOG_COLUMNS = [
    *["user_id", "video_id", "date", "hourmin", "time_ms", *FLAGS, "play_time_ms", "duration_ms"],
    *["profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand", "tab"],
]


def midnight_ms(date: int) -> int:
    """Start of a day in Beijing."""
    day = datetime.datetime.strptime(str(date), "%Y%m%d").replace(tzinfo=datetime.timezone(datetime.timedelta(hours=8)))
    return int(day.timestamp() * 1000)


def make_log(seed: int, rows: int, dates=DATES, videos: int = VIDEOS, is_rand: int = 0) -> pd.DataFrame:
    """Rows in bursts of a few minutes, so that requests and sessions of several videos come about."""
    rng = np.random.default_rng(seed)
    bursts = rows // 5
    user, date = rng.integers(0, USERS, bursts), rng.choice(dates, bursts)
    start = np.array([midnight_ms(int(d)) for d in date]) + rng.integers(0, 23 * 3_600_000, bursts)
    frame = pd.DataFrame({"user_id": user, "date": date, "start": start}).loc[np.repeat(np.arange(bursts), 5)]
    n = len(frame)
    frame["time_ms"] = frame.pop("start") + np.tile(np.arange(5), bursts) * rng.integers(20_000, 600_000, n)
    frame["video_id"] = rng.integers(0, videos, n)
    for name in FLAGS:
        frame[name] = rng.integers(0, 2, n)
    frame["is_profile_enter"] = rng.integers(0, 2, n)
    frame["duration_ms"] = 10_000 + frame["video_id"] * 500
    frame["play_time_ms"] = rng.integers(0, 40_000, n)
    frame["tab"] = rng.choice([0, 1, 1, 1, 4, 17], n)
    frame["hourmin"], frame["profile_stay_time"], frame["comment_stay_time"] = 1200, 0, 0
    frame["is_rand"] = is_rand
    return frame[LOG_COLUMNS].reset_index(drop=True)


def make_users() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    n = USERS - 1  # one user has no features
    users = pd.DataFrame({"user_id": np.arange(n)})
    users["user_active_degree"] = rng.choice(["full_active", "high_active", "UNKNOWN"], n)
    users["is_lowactive_period"], users["is_live_streamer"] = 0, rng.choice([-124, 1], n)
    users["is_video_author"] = rng.integers(0, 2, n)
    for name in ("follow_user_num", "fans_user_num", "friend_user_num", "register_days"):
        users[name] = rng.integers(0, 1000, n)
        users[f"{name}_range"] = "[10,100)"
    for i in range(18):
        users[f"onehot_feat{i}"] = rng.integers(0, 1000 if i == 3 else 4, n).astype(float)
    users.loc[2, "onehot_feat4"] = np.nan
    return users


def make_videos() -> pd.DataFrame:
    rng = np.random.default_rng(2)
    videos = pd.DataFrame({"video_id": np.arange(VIDEOS), "author_id": rng.integers(0, 40, VIDEOS) + 1000})
    videos["video_type"] = rng.choice(["NORMAL", "AD"], VIDEOS)
    videos["upload_dt"] = "2022-04-10"
    videos.loc[80:84, "upload_dt"] = "2022-05-04"  # uploaded on the first test day
    videos.loc[85:, "upload_dt"] = None  # live on the day after the log first shows them
    videos["upload_type"] = rng.choice(["Web", "Kmovie", "LongImport"], VIDEOS)
    videos["visible_status"] = 0.0
    videos["video_duration"] = 10_000.0 + videos["video_id"] * 500
    videos["tag"] = rng.choice(["3", "39,68", "12", None], VIDEOS)
    return videos


def write(folder: pathlib.Path, variant: str = "pure", **replaced: pd.DataFrame) -> pathlib.Path:
    """Writes the files, with `standard`, `random`, `users` or `videos` replaced; 27K comes in parts."""
    frames = {
        "standard": make_log(0, 1500),
        "random": make_log(9, 300, is_rand=1),
        "users": make_users(),
        "videos": make_videos(),
    } | replaced
    data = folder / "data"
    data.mkdir(parents=True)
    stems = {
        "standard": f"log_standard_4_22_to_5_08_{variant}",
        "random": f"log_random_4_22_to_5_08_{variant}",
        "users": f"user_features_{variant}",
        "videos": f"video_features_basic_{variant}",
    }
    for kind, stem in stems.items():
        if variant == "27k" and kind in ("standard", "videos"):
            for part, rows in enumerate(np.array_split(np.arange(len(frames[kind])), 3), 1):
                frames[kind].iloc[rows].to_csv(data / f"{stem}_part{part}.csv", index=False)
        else:
            frames[kind].to_csv(data / f"{stem}.csv", index=False)
    return folder


def loaded(log: kuairand.KuaiRand) -> tuple[dict[str, Sessions], types.Items, InputSpec, dict]:
    """All sessions of a prepared log by part, its items, spec and report."""
    return {name: log.part(name) for name in PARTS}, log.items, log.spec, dict(log.report)
