"""Lines of CSV files: headers, chunks of lines, and the cells of lines that may have any fault.

The result for a line depends only on the line and the header, not on its position in a file or chunk. Lines end in LF
or CR LF; a quoted cell may contain commas but no line end. Blank lines are skipped.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import pathlib
from collections.abc import Iterable

import polars as pl

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


def cut(raw: bytes, size: int) -> list[bytes]:
    """Cut bytes into pieces of whole lines, of about `size` bytes each; at least one."""
    edges = [0]
    while end := raw.find(b"\n", edges[-1] + size - 1) + 1:
        edges.append(end)
    return [raw[a:b] for a, b in itertools.pairwise([*edges, len(raw)]) if b > a] or [raw]


def split(raw: bytes) -> pl.Series:
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
