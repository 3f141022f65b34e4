"""Reads log files as `prepare` does, up to the report, without making records."""

from __future__ import annotations

import pathlib

import kuairand_files as files
import numpy as np
import polars as pl

from mmrf_jax.data.readers.kuairand import clean, csv_files, release

NAME = "log_standard_4_22_to_5_08_pure.csv"
HEADER = ",".join(files.LOG_COLUMNS)


def good_lines(number: int = 12) -> list[str]:
    """Lines of different users and days without any fault."""
    frame = files.make_log(3, 5 * number).iloc[::5]
    return frame.to_csv(index=False, header=False).splitlines()


def cells_of(line: str) -> dict[str, str]:
    return dict(zip(files.LOG_COLUMNS, line.split(","), strict=True))


def with_cells(line: str, **cells: str) -> str:
    """A line with some of its cells replaced."""
    return ",".join((cells_of(line) | cells).values())


def known(video: np.ndarray) -> np.ndarray:
    """Durations of the features: of the first videos."""
    return np.where((video >= 0) & (video < files.VIDEOS), 10_000 + video * 500, 0)


def read(path: pathlib.Path, size: int) -> tuple[pl.DataFrame, dict[str, int]]:
    """The usable rows of a file that is read in chunks of some bytes, and the report of its log."""
    random_file = release.is_random(path)
    frames = [clean.mark(csv_files.read_log_lines(chunk), random_file) for chunk in csv_files.chunks(path, size)]
    usable, _, report = clean.clean_rows(pl.concat(frames, how="vertical_relaxed"), known)
    rows = len(frames) and sum(len(frame) for frame in frames)
    counts = {key: sum(of[key] for of in report.values()) for key in report["standard"]}
    assert counts["rows"] == rows
    return usable, counts


def unused(counts: dict[str, int]) -> dict[str, int]:
    """How many rows are not used for each reason; all rows are used or counted under one."""
    reasons = {key: counts[key] for key in (*clean.REASONS, "duplicates") if counts[key]}
    assert counts["rows"] == counts["used"] + sum(reasons.values())
    return reasons
