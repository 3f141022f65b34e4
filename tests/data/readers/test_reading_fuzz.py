"""Mutated files: no traceback, and no silent loss: rows in = rows used + rows counted by reason.

A seed gives one mutated source. Thirty are read in the fast tests, thousands are prepared as a whole at night:

  python -m pytest tests/data/test_reading_fuzz.py -m nightly
"""

from __future__ import annotations

import functools
import json
import pathlib

import kuairand_files as files
import numpy as np
import polars as pl
import pytest
import reading

from mmrf_jax.data.readers.engine import tasks
from mmrf_jax.data.readers.kuairand import csv_files, prepare, release
from mmrf_jax.data.readers.kuairand.config import KuaiRandConfig
from mmrf_jax.data.splits import SPLITS
from mmrf_jax.io.progress import counted

CONFIG = KuaiRandConfig(candidates=20, slate=3, history=4)
FAST_SEEDS, NIGHTLY_SEEDS, AT_ONCE = range(30), range(30, 4_030), 250
#: Seeds that once ended in a traceback or lost rows.
FOUND: tuple[int, ...] = ()
CELLS = (
    *("", " ", "0", "1", "2", "-1", "-5", "+1", "007", "1.0", "1.5", ".", "-", "1e3", "1E+05", "1.65061E+12", "1e400"),
    *("nan", "inf", "None", "NULL", "True", "x", "é", "\ufeff", "\u2028", "\x00", "\x01", "\x85", "\xa01", "१"),
    *("1_000", '"1"', '"1,0"', '"', '""', '"a\nb"', "'1'", "1;2", "1\t", "\r", "#", "=1+1", "2022-04-22", "20220231"),
    *("127", "128", "32768", "2147483647", "2147483648", "4294967296", "9007199254740993", "9223372036854775807"),
    *("9223372036854775808", "18446744073709551616", "1" * 40, "-2147483648", "-9223372036854775808", "99999999"),
)
BYTES = [c.encode() for c in ',"\n\r \t;.-+eE01\x00'] + [
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r\n",
    b",,",
    b'","',
    b'""',
    b"\n\n",
]


@functools.cache
def texts() -> dict[str, str]:
    """The files of a source without any fault."""
    frames = {
        "log_standard_4_22_to_5_08_pure.csv": files.make_log(0, 60),
        "log_random_4_22_to_5_08_pure.csv": files.make_log(9, 30, is_rand=1),
        "user_features_pure.csv": files.make_users(),
        "video_features_basic_pure.csv": files.make_videos().iloc[:40],
    }
    return {name: frame.to_csv(index=False) for name, frame in frames.items()}


def mutate(seed: int) -> dict[str, bytes]:
    """A source with one to four faults, most of them in the standard log."""
    rng = np.random.default_rng(seed)
    made = {name: text.encode() for name, text in texts().items()}
    names = list(made)
    for _ in range(rng.integers(1, 5)):
        name = names[int(rng.choice(4, p=[0.55, 0.15, 0.15, 0.15]))]
        change = MUTATIONS[rng.integers(len(MUTATIONS))]
        made[name] = change(rng, made[name])
    return made


def some_line(rng: np.random.Generator, lines: list[bytes]) -> int:
    """The place of a line, the first and the last of which are as likely as all others together."""
    return int(rng.choice([min(1, len(lines) - 1), len(lines) - 1, rng.integers(len(lines))]))


def change_bytes(rng, data):
    for _ in range(rng.integers(1, 6)):
        at, length = int(rng.integers(len(data) + 1)), int(rng.choice([0, 0, 1, 3, 60]))
        data = data[:at] + BYTES[rng.integers(len(BYTES))] * int(rng.choice([0, 1, 1, 2])) + data[at + length :]
    return data


def change_cells(rng, data):
    lines = data.split(b"\n")
    for _ in range(rng.integers(1, 6)):
        at = some_line(rng, lines)
        cells = lines[at].split(b",")
        cells[rng.integers(len(cells))] = CELLS[rng.integers(len(CELLS))].encode()
        lines[at] = b",".join(cells)
    return b"\n".join(lines)


def change_lines(rng, data):
    lines = data.split(b"\n")
    at, other = some_line(rng, lines), some_line(rng, lines)
    new = [
        lines[at] + b",",
        lines[at] + b",1",
        lines[at].rpartition(b",")[0],
        lines[at].partition(b",")[2],
        b"",
        b"  ",
        b"\r",
        b"," * lines[at].count(b","),
        lines[0],
        lines[other],
        b'"' + lines[at].replace(b",", b'","') + b'"',
        lines[at] + b"\r",
        lines[at][: int(rng.integers(len(lines[at]) + 1))],
    ][rng.integers(13)]
    return b"\n".join([*lines[:at], *([new] * int(rng.integers(1, 4))), *lines[at + int(rng.integers(2)) :]])


def change_column(rng, data):
    lines = [line.split(b",") for line in data.split(b"\n")]
    column = int(rng.integers(len(lines[0])))
    change = (
        lambda cell: cell + b"000",
        lambda cell: cell[:-3],
        lambda cell: b'"' + cell + b'"',
        lambda cell: cell + b".0",
        lambda cell: b"-" + cell,
        lambda cell: b" " + cell + b" ",
        lambda cell: CELLS[column % len(CELLS)].encode(),
        lambda cell: cell + b"," + cell,
    )[rng.integers(8)]
    first = int(rng.integers(2))  # with the header or without
    for line in lines[first:]:
        if column < len(line):
            line[column] = change(line[column])
    return b"\n".join(b",".join(line) for line in lines)


def change_file(rng, data):
    return (
        lambda: data.replace(b"\n", b"\r\n"),
        lambda: data.replace(b"\n", b"\r"),
        lambda: data.replace(b",", b";"),
        lambda: b"\xef\xbb\xbf" + data,
        lambda: b"\n\n" + data,
        lambda: data[: int(rng.integers(len(data) + 1))],
        lambda: data + data,
        lambda: data.partition(b"\n")[0],
        lambda: data.partition(b"\n")[2],
        lambda: b"",
        lambda: data.decode("utf-8", "replace").encode("utf-16"),
        lambda: data.rstrip(b"\n"),
    )[rng.integers(12)]()


MUTATIONS = (change_bytes, change_cells, change_cells, change_lines, change_lines, change_column, change_file)


def rows_in(data: bytes) -> int:
    """Lines that are not blank, the header apart."""
    lines = data.decode("utf-8-sig", "replace").split("\n")
    return max(sum(bool(line.strip()) for line in lines) - 1, 0)


def check_message(error: Exception, seed: int) -> None:
    text = str(error)
    ours = text.replace("'None'", "")  # a cell of the file's
    assert ours and "\n" not in ours and "None" not in ours and "to at most 0" not in ours, (seed, text)


def read_source(seed: int, folder: pathlib.Path) -> None:
    """Reads each file of a mutated source whole and in chunks."""
    parts = int(np.random.default_rng([seed, 1]).integers(2, 5))
    for name, data in mutate(seed).items():
        path = folder / name
        path.write_bytes(data)
        if data == texts()[name].encode():
            continue
        size = len(data) // parts + 1
        try:
            if name.startswith("log"):
                (one, counts), (other, again) = (reading.read(path, of) for of in (1 << 30, size))
                reading.unused(counts)
                same = dict.fromkeys(csv_files.IDS, pl.Int64)
                assert (
                    counts == again and counts["rows"] == rows_in(data) and one.cast(same).equals(other.cast(same))
                ), seed
            elif name.startswith("user"):
                assert len(csv_files.read_users((path,))[0]) == rows_in(data), seed
            else:
                pieces = [[csv_files.read_videos(c)[0] for c in csv_files.chunks(path, of)] for of in (1 << 30, size)]
                joined = [pl.concat(frames, how="vertical_relaxed") for frames in pieces]
                one, other = (frame.with_columns(pl.col(pl.String).fill_null("")) for frame in joined)
                assert len(one) == rows_in(data) and one.equals(other.cast(one.schema)), seed
        except ValueError as error:
            check_message(error, seed)


def prepare_source(seed: int, folder: pathlib.Path) -> str:
    """Prepares a mutated source; gives what the error says, empty where there was none."""
    data = mutate(seed)
    for name, content in data.items():
        (folder / name).write_bytes(content)
    work = folder / "work"
    work.mkdir()
    size = int([1 << 20, 900][seed % 2])
    job = prepare.KuaiRandJob(release.find_release(folder), CONFIG, work, chunk_bytes=size, bucket_rows=40)
    try:
        with tasks.worker_processes(1) as engine:
            report = json.loads((prepare.run_stages(job, engine, counted) / prepare.ABOUT).read_text())["report"]
    except ValueError as error:
        check_message(error, seed)
        return str(error)
    logs, features, splits = report["log"], report["features"], report["splits"]
    assert sum(log["rows"] for log in logs.values()) == sum(rows_in(data[p.name]) for p in job.release.logs), seed
    for counts in logs.values():
        reading.unused(counts)
    shown = sum(splits[name]["exposures"] for name in SPLITS)
    assert logs["standard"]["used"] == shown + report["standard_rows_between_splits"], seed
    for kind, paths in (("users", job.release.users), ("videos", job.release.videos)):
        counts = features[kind]
        assert counts["rows"] == sum(rows_in(data[p.name]) for p in paths), seed
        assert 0 <= counts["unparsable"] + counts["duplicates"] <= counts["rows"], seed
    return ""


@pytest.mark.parametrize("first", FAST_SEEDS[::10])
def test_mutated_files_lose_no_row_silently(first, tmp_path):
    for seed in (*range(first, first + 10), *(FOUND if first == 0 else ())):
        read_source(seed, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("first", NIGHTLY_SEEDS[::AT_ONCE])
def test_mutated_files_are_read_in_any_chunks(first, tmp_path):
    for seed in range(first, first + AT_ONCE):
        read_source(seed, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("first", NIGHTLY_SEEDS[:2_000:AT_ONCE])
def test_mutated_sources_are_prepared_or_refused_in_a_line(first, tmp_path):
    refused = 0
    for seed in range(first, first + AT_ONCE):
        folder = tmp_path / str(seed)
        folder.mkdir()
        refused += prepare_source(seed, folder) != ""
    assert 0.1 < refused / AT_ONCE < 0.9  # both are tried
