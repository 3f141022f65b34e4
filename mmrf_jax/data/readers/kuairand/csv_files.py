"""The lines of KuaiRand's official files, and the cells of their columns.

Every reader returns a polars frame in which a cell that is not a number is null; `clean` counts unusable rows. The
result for a line depends only on the line and the header, not on its position in a file or chunk. Lines end in LF or
CR LF; a quoted cell may contain commas but no line end. Blank lines are skipped. docs/reading-logs.md lists the effect
of each fault of a file.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl

from mmrf_jax.data.readers.kuairand.release import Release

#: Column of the log for each binary signal, in the order of `signals.SHORT_VIDEO`; watch time is `play_time_ms`.
SIGNAL_COLUMNS = (
    "is_click",
    "long_view",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "is_profile_enter",
)
#: Required log columns, with the narrowest type that holds them.
LOG_TYPES = {
    "user_id": pl.Int32,
    "video_id": pl.Int32,
    "date": pl.Int32,
    "time_ms": pl.Int64,
    **dict.fromkeys(SIGNAL_COLUMNS, pl.Int8),
    "play_time_ms": pl.Int32,
    "duration_ms": pl.Int32,
    "is_rand": pl.Int8,
    "tab": pl.Int16,
}
#: Log columns used only to distinguish exact duplicates from rows that differ.
EXTRA_LOG_TYPES = {"hourmin": pl.Int32, "profile_stay_time": pl.Int64, "comment_stay_time": pl.Int64}
IDS = ("user_id", "video_id")
USER_FLAGS = ("is_lowactive_period", "is_live_streamer", "is_video_author")
USER_COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
USER_CODES = tuple(f"onehot_feat{i}" for i in range(18))
USER_COLUMNS = ("user_id", "user_active_degree", *USER_FLAGS, *USER_COUNTS, *USER_CODES)
VIDEO_COLUMNS = ("video_id", "author_id", "video_type", "upload_dt", "upload_type", "video_duration", "tag")

#: First bytes of files that are not CSV in UTF-8, their formats, and the fixes.
_MAGIC = {
    b"\x1f\x8b": ("compressed by gzip", "unpack it with gunzip"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unpack it with unzstd"),
    b"BZh": ("compressed by bzip2", "unpack it with bunzip2"),
    b"\xfd7zXZ": ("compressed by xz", "unpack it with unxz"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or save it as CSV"),
    b"PAR1": ("a Parquet file", "save it as CSV"),
    b"\xff\xfe": ("in UTF-16", "save it as CSV in UTF-8"),
    b"\xfe\xff": ("in UTF-16", "save it as CSV in UTF-8"),
}
#: A line in which all quotes surround whole cells without commas.
_PLAIN_QUOTES = r'^(?:"[^",]*"|[^",]*)(?:,(?:"[^",]*"|[^",]*))*$'
_NO = pl.Series([False])
_LONGEST_HEADER = 1 << 20  # bytes; a file without line ends may have any size
#: Spreadsheets and R write numbers with fewer digits in full.
_LOST_FROM_EXPONENT = 11
_PIECE = 4 << 20  # bytes per piece of faulty lines, since each piece takes fifty times as much memory
_OPTIONS: dict[str, Any] = {"has_header": False, "quote_char": None, "encoding": "utf8-lossy"}


def check_headers(release: Release) -> None:
    """Raise ValueError for a file that is empty, not CSV, or whose header lacks a column or has one twice."""
    for paths, needed in (
        (release.logs, LOG_TYPES),
        (release.users, USER_COLUMNS),
        (release.videos, VIDEO_COLUMNS),
    ):
        for path in paths:
            read_header(path, needed)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The lines of a file that begin in its bytes `start` … `end` − 1."""

    path: pathlib.Path
    start: int
    end: int

    def read(self) -> bytes:
        with open(self.path, "rb") as f:
            f.seek(max(self.start - 1, 0))
            if self.start:
                f.readline()  # skip the rest of a line that began before
            rest = self.end - f.tell()
            return f.read(rest - 1) + f.readline() if rest > 0 else b""


def whole(path: pathlib.Path) -> Chunk:
    """Return all lines of a CSV file except its header."""
    return Chunk(path, len(read_top(path)), path.stat().st_size)


def chunks(path: pathlib.Path, size: int) -> list[Chunk]:
    """Return the lines of a CSV file except its header, in chunks of about `size` bytes; at least one."""
    all_lines = whole(path)
    first, end = all_lines.start, all_lines.end
    edges = [first, *range(first + size, end - size // 2, size), end]
    return [Chunk(path, a, b) for a, b in itertools.pairwise(edges)]


def read_top(path: pathlib.Path) -> bytes:
    """Read the header's line, and the blank lines before it."""
    top = line = b""
    with open(path, "rb") as f:
        while line.strip() in (b"", b"\xef\xbb\xbf") and (line := f.readline(_LONGEST_HEADER)):
            top += line
    return top


def read_header(path: pathlib.Path, needed: Iterable[str]) -> list[str]:
    """Read the column names of a CSV file, one per field; `column 3` stands for a third column without a name.

    Raises:
      ValueError: for a file that is empty, not CSV, not separated by commas, lacks a column or has one twice.
    """
    top = read_top(path)
    for magic, (what, fix) in _MAGIC.items():
        if top.startswith(magic):
            raise ValueError(f"{path} is {what}; {fix}")
    text = top.decode("utf-8-sig", "replace").strip()
    if not text:
        raise ValueError(f"{path} is empty; copy it again from the KuaiRand download")
    if "\r" in text:
        raise ValueError(f"{path} has lines that end in CR alone; convert their ends to LF")
    header = [name.strip().strip('"') for name in _split_quoted(text)]
    for name in needed:
        if name not in header:
            for separator, called in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
                if name in (part.strip().strip('"') for part in text.split(separator)):
                    raise ValueError(f"{path} is separated by {called}; save it with commas")
            raise ValueError(f"{path} has no column {name!r}; copy it again from the KuaiRand download")
    for i, name in enumerate(header):
        if name and name in header[:i]:
            raise ValueError(f"{path} has the column {name!r} twice; remove one of the two")
    return [name or f"column {i}" for i, name in enumerate(header, 1)]


def cut_lines(raw: bytes, size: int) -> list[bytes]:
    """Cut bytes into pieces of whole lines, of about `size` bytes each; at least one."""
    edges = [0]
    while end := raw.find(b"\n", edges[-1] + size - 1) + 1:
        edges.append(end)
    return [raw[a:b] for a, b in itertools.pairwise([*edges, len(raw)]) if b > a] or [raw]


def split_cells(raw: bytes) -> pl.Series:
    """Split each line that is not blank into cells: lists of strings without the surrounding quotes."""
    line = pl.Series("line", [raw.decode("utf-8", "replace")]).str.split("\n").explode()
    line = line.filter(line.str.strip_chars() != "").str.strip_suffix("\r")
    quoted = line.str.contains('"', literal=True)
    if not quoted.any():
        return line.str.split(",")
    plain = line.str.contains(_PLAIN_QUOTES)
    cells = pl.DataFrame({"at": pl.int_range(len(line), eager=True), "line": line})
    pieces = [
        cells.filter(plain).select("at", pl.col("line").str.replace_all('"', "", literal=True).str.split(",")),
        cells.filter(~plain).select(
            "at", pl.Series("line", [_split_quoted(text) for text in line.filter(~plain)], pl.List(pl.String))
        ),
    ]
    return pl.concat(pieces).sort("at")["line"]


def _split_quoted(line: str) -> list[str]:
    """Split a line as the csv module does; at all commas if its quotes are malformed."""
    try:
        return next(csv.reader([line], strict=True))
    except (csv.Error, StopIteration):
        return line.split(",")


def parse_whole_numbers(text: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Parse cells as Int64, and flag cells that lack digits because a spreadsheet cut them off (`1.65061E+12`).

    A cell that is not a whole number is null, and so is one that lacks digits. `7`, ` 7`, `+7`, `007`, `7.0` and `7e0`
    are 7.
    """
    text = text.str.strip_chars()
    number = text.cast(pl.Int64, strict=False)
    if not number.null_count():
        return number, _NO.new_from_index(0, len(text))
    decimal = text.cast(pl.Float64, strict=False)
    # Beyond 2^53 Float64 itself lacks digits.
    whole_number = (decimal == decimal.floor()) & (decimal.abs() < 2**53)
    parts = text.str.extract_groups(r"^[+-]?\d+\.?(\d*)[eE]\+?(\d{1,3})$").struct.unnest()
    decimals, exponent = parts["1"].str.len_chars(), parts["2"].cast(pl.Int64, strict=False)
    lost = ((exponent >= _LOST_FROM_EXPONENT) & (decimals < exponent)).fill_null(False)
    frame = pl.DataFrame({"number": number, "decimal": decimal, "use": whole_number.fill_null(False) & ~lost})
    usable = pl.when("use").then("decimal").cast(pl.Int64, strict=False)
    return frame.select(pl.coalesce("number", usable).alias(text.name)).to_series(), lost


def read_log_lines(chunk: Chunk) -> pl.DataFrame:
    """Read lines of a log file.

    Returns:
      A row per line that is not blank: the columns of `LOG_TYPES` and `EXTRA_LOG_TYPES` (zeros if the file lacks one of
      these) and `lost_digits`. A cell that is not a whole number in its column's range is null, and so are all cells of
      a line with more or fewer fields than the header, except its user. Ids are Int64 if Int32 is too narrow for one of
      the chunk, and null below 0. `lost_digits`: a cell of `LOG_TYPES` is null because a spreadsheet rounded it, as in
      1.65061E+12.

    Raises:
      ValueError: as `check_headers`.
    """
    header = read_header(chunk.path, LOG_TYPES)
    kept = {name: kind for name, kind in {**LOG_TYPES, **EXTRA_LOG_TYPES}.items() if name in header}
    raw = chunk.read()
    rows = _read_numbers(raw, header, kept)
    if rows is None:  # some pieces may have no fault
        pieces = cut_lines(raw, _PIECE)
        read = [_read_numbers(piece, header, kept) if len(pieces) > 1 else None for piece in pieces]
        cells = [_read_cells(p, header, kept) if of is None else of for p, of in zip(pieces, read, strict=True)]
        rows = pl.concat(cells, how="vertical_relaxed")
    absent = [pl.lit(0, dtype=kind).alias(name) for name, kind in EXTRA_LOG_TYPES.items() if name not in kept]
    return rows.with_columns(*absent).select(*LOG_TYPES, *EXTRA_LOG_TYPES, "lost_digits")


def _read_numbers(raw: bytes, header: list[str], kept: dict[str, Any]) -> pl.DataFrame | None:
    """Read lines of a log without any fault; return None if there is a fault."""
    if b'"' in raw:
        return None
    if not raw.endswith(b"\n"):
        raw += b"\n"  # otherwise polars ignores a comma at the end
    for id_type in (pl.Int32, pl.Int64):
        types = kept | dict.fromkeys(IDS, id_type)
        try:
            spec = {name: types.get(name, pl.String) for name in header}
            frame = pl.read_csv(raw, schema=spec, ignore_errors=True, **_OPTIONS)
        except pl.exceptions.PolarsError:  # the first line, or one with too many fields
            return None
        unread = {name for name in kept if frame[name].null_count()}
        if not unread:
            break
        if unread - set(IDS):
            return None
    if unread or any((frame[name] < 0).any() for name in IDS):
        return None
    if header[-1] not in kept and raw.count(b",") != len(frame) * (len(header) - 1):
        return None  # a line has too few fields, and the last fields are not read
    return frame.select(*kept, pl.lit(False).alias("lost_digits"))


def _read_cells(raw: bytes, header: list[str], kept: dict[str, Any]) -> pl.DataFrame:
    """Read lines of a log that may have any fault, at a fifth of the speed."""
    cells = split_cells(raw)
    full = cells.list.len() == len(header)
    rows: dict[str, pl.Series] = {}
    lost = full ^ full
    for name in kept:
        number, rounded = parse_whole_numbers(cells.list.get(header.index(name), null_on_oob=True).alias(name))
        if name in LOG_TYPES:
            lost |= rounded
        if name in IDS:
            rows[name] = _narrow_ids(number)
        else:
            rows[name] = number.cast(kept[name], strict=False)
    frame = pl.DataFrame(rows).with_columns(full.alias("full"), lost.alias("lost_digits"))
    others = pl.when("full").then(pl.exclude("user_id", "full", "lost_digits"))
    return frame.select("user_id", others, pl.col("lost_digits") & pl.col("full"))


def _narrow_ids(number: pl.Series) -> pl.Series:
    """Cast ids to Int32 if all fit; ids below 0 become null."""
    number = pl.select(pl.when(number >= 0).then(number).alias(number.name)).to_series()
    return number if (number >= 2**31).any() else number.cast(pl.Int32)


#: Per feature column: number of non-empty cells, number of these that could not be parsed, and the first of the latter.
CellCounts = dict[str, tuple[int, int, str | None]]


def read_users(paths: tuple[pathlib.Path, ...]) -> tuple[pl.DataFrame, CellCounts]:
    """Read user features.

    Returns:
      A row per line that is not blank: `user_id` as in `read_log_lines` (null if it or the number of fields is wrong),
      `user_active_degree` String, the others Float64; and counts of cells that could not be parsed.
    """
    text = pl.concat([_read_text(whole(path), USER_COLUMNS) for path in paths])
    numbers = [name for name in USER_COLUMNS if name not in ("user_id", "user_active_degree")]
    frame = text.with_columns(
        _parse_ids(text["user_id"]), *(_parse_numbers(text[name]).alias(name) for name in numbers)
    )
    return frame, _count_cells(text, {name: frame[name] for name in numbers})


def read_videos(chunk: Chunk) -> tuple[pl.DataFrame, CellCounts]:
    """Read lines of basic video features.

    Returns:
      A row per line that is not blank: `video_id` as in `read_log_lines` (null if it or the number of fields is wrong),
      `author_id` Int64, `video_type` and `upload_type` String, `upload_dt` Int32 (20220409), `duration_ms` Float64
      (null unless positive), `tag` Int32 (the first of the video's tags); and counts of cells that could not be parsed.
    """
    text = _read_text(chunk, VIDEO_COLUMNS)
    day = pl.col("upload_dt").str.slice(0, 10).str.replace_all("-", "", literal=True).cast(pl.Int32, strict=False)
    frame = text.select(
        _parse_ids(text["video_id"]),
        parse_whole_numbers(text["author_id"])[0],
        pl.col("video_type", "upload_type"),
        pl.when(day > 10_000_000).then(day).alias("upload_dt"),
        _parse_numbers(text["video_duration"]).alias("duration_ms"),
        pl.col("tag").str.extract(r"^\s*(\d+)").cast(pl.Int32, strict=False),
    )
    parsed = {"author_id": "author_id", "upload_dt": "upload_dt", "video_duration": "duration_ms", "tag": "tag"}
    counts = _count_cells(text, {name: frame[of] for name, of in parsed.items()})
    return frame.with_columns(pl.when(pl.col("duration_ms") > 0).then("duration_ms").alias("duration_ms")), counts


def add_cells(counts: Sequence[CellCounts]) -> CellCounts:
    """Add the counts of several pieces of a file."""
    return {
        name: (
            sum(of[name][0] for of in counts),
            sum(of[name][1] for of in counts),
            next((of[name][2] for of in counts if of[name][2] is not None), None),
        )
        for name in counts[0]
    }


def check_cells(path: pathlib.Path, counts: CellCounts) -> None:
    """Raise ValueError if most cells of a feature column have another format than in the release."""
    for name, (filled, unread, example) in counts.items():
        if 2 * unread > filled:
            form = "a day such as 2022-04-10" if name == "upload_dt" else "a number"
            raise ValueError(
                f"{path}: {unread:,} of {filled:,} cells of {name} cannot be read, the first is {example!r}; write "
                f"{form}, or leave empty what is not known"
            )


def _count_cells(text: pl.DataFrame, parsed: dict[str, pl.Series]) -> CellCounts:
    counts: CellCounts = {}
    for name, values in parsed.items():
        wrong = text[name].filter(values.is_null() & text[name].is_not_null())
        not_blank = wrong.filter(wrong.str.strip_chars() != "")
        filled = len(text) - text[name].null_count() - (len(wrong) - len(not_blank))
        counts[name] = filled, len(not_blank), not_blank[0] if len(not_blank) else None
    return counts


def _parse_ids(text: pl.Series) -> pl.Series:
    return _narrow_ids(parse_whole_numbers(text)[0])


def _parse_numbers(text: pl.Series) -> pl.Series:
    """Parse cells as Float64, null if not a finite number."""
    value = text.cast(pl.Float64, strict=False)
    if value.null_count() > text.null_count():
        value = text.str.strip_chars().cast(pl.Float64, strict=False)
    return value if value.is_finite().all() else pl.select(pl.when(value.is_finite()).then(value)).to_series()


def _read_text(chunk: Chunk, names: tuple[str, ...]) -> pl.DataFrame:
    """Read cells as text, a row per line that is not blank; null throughout if the number of fields is wrong."""
    header = read_header(chunk.path, names)
    raw = chunk.read()
    frame = _read_quoted(raw, header)
    if frame is not None:
        return frame.select(names)
    return pl.concat([_read_all(piece, header, names) for piece in cut_lines(raw, _PIECE)])


def _read_quoted(raw: bytes, header: list[str]) -> pl.DataFrame | None:
    """Read lines of features without any fault; return None if there is a fault."""
    if not raw.endswith(b"\n"):
        raw += b"\n"
    try:
        frame = pl.read_csv(raw, has_header=False, schema=dict.fromkeys(header, pl.String), encoding="utf8-lossy")
    except pl.exceptions.PolarsError:  # the first line, or one with too many fields
        return None
    within = frame.select(pl.all().str.count_matches(",", literal=True).sum()).row(0) if b'"' in raw else (0,)
    separating = raw.count(b",") - sum(within)
    whole_lines = raw.count(b"\n") == len(frame) and raw.count(b"\r") == raw.count(b"\r\n")
    return frame if whole_lines and separating == len(frame) * (len(header) - 1) else None


def _read_all(raw: bytes, header: list[str], names: tuple[str, ...]) -> pl.DataFrame:
    """Read lines of features that may have any fault."""
    cells = split_cells(raw)
    full = cells.list.len() == len(header)
    columns = [cells.list.get(header.index(name), null_on_oob=True).alias(name) for name in names]
    return pl.DataFrame(columns).with_columns(full.alias("full")).select(pl.when("full").then(pl.col(names)))
