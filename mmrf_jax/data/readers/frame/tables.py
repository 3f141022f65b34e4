"""Any table as a polars frame: pandas, polars and pyarrow tables, and files by path, glob or folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from mmrf_jax import fields
from mmrf_jax.io import copies, storage

_CSV = {"glob": False, "infer_schema_length": 10_000, "null_values": ["", "NA", "NaN", "nan", "NULL", "null", "None"]}
# `_files` has found the files: to polars a name with brackets would be a pattern again.
_ARROW_ENDINGS = (".arrow", ".ipc", ".feather")
_ARROW = functools.partial(pl.scan_ipc, glob=False)
_SCANS: dict[str, Callable[[list[str]], pl.LazyFrame]] = {
    ".csv": lambda paths: pl.scan_csv(paths, **_CSV),  # type: ignore[arg-type]
    ".csv.gz": lambda paths: pl.scan_csv(paths, **_CSV),  # type: ignore[arg-type]
    ".tsv": lambda paths: pl.scan_csv(paths, separator="\t", **_CSV),  # type: ignore[arg-type]
    ".parquet": functools.partial(pl.scan_parquet, glob=False),
    **dict.fromkeys(_ARROW_ENDINGS, _ARROW),
}

Table = Any  # pandas.DataFrame, polars.DataFrame or LazyFrame, pyarrow.Table, a mapping of columns, or path(s)


def read_table(
    table: Table, what: str, wanted: Collection[str] | None = None, needed: Mapping[str, str] | None = None
) -> pl.DataFrame:
    """Read a table.

    Args:
      table: a pandas, polars or pyarrow table; a mapping of columns; or files: a path, a glob, a folder, or several.
      what: name of the table in messages, such as "log".
      wanted: the columns to read, as far as the table has them; None for all.
      needed: {role: column} that the table must have.

    Raises:
      ValueError: for a table of another type, no file, files of several kinds, a damaged file, or a missing or doubled
        column.
    """
    with _readable(what):
        return _lazy(table, what, wanted, needed)[0].collect()


def scan_table(
    table: Table, what: str, wanted: Collection[str], needed: Mapping[str, str] | None = None
) -> pl.LazyFrame:
    """Return the wanted columns of a table, read when they are used; arguments and errors as of `read_table`."""
    with _readable(what):
        return _lazy(table, what, wanted, needed)[0]


@dataclasses.dataclass(frozen=True)
class TablePieces:
    """A table of any size in files of which any rows are read without those before.

    Attributes:
      paths: the files, in order.
      form: their ending, `.parquet` or `.arrow`.
      names: the columns to read.
      rows: of all files.
    """

    paths: tuple[str, ...]
    form: str
    names: tuple[str, ...]
    rows: int

    def read(self, start: int, rows: int) -> pl.DataFrame:
        """Read up to `rows` rows from row `start` on."""
        with _readable("log"):
            return _SCANS[self.form](list(self.paths)).select(self.names).slice(start, rows).collect()


def table_pieces(
    table: Table, what: str, wanted: Collection[str], needed: Mapping[str, str], copy: Path
) -> TablePieces:
    """Return a table as pieces: Parquet and Arrow files unchanged, any other one as an Arrow file at `copy`.

    Args and errors are those of `read_table`.
    """
    with _readable(what):
        lazy, files = _lazy(table, what, wanted, needed)
        form = _kind(files[0]) if files else None
        if not files or form not in (".parquet", *_ARROW_ENDINGS):
            files, form = [str(copy)], ".arrow"
            if not copy.exists():
                temporary = copy.with_name(f".{copy.name}")
                lazy.sink_ipc(temporary, maintain_order=True)
                temporary.rename(copy)
            lazy = _ARROW(files).select(lazy.collect_schema().names())
        rows = int(lazy.select(pl.len()).collect().item())
        return TablePieces(tuple(map(os.path.abspath, files)), str(form), tuple(lazy.collect_schema().names()), rows)


def files_of(table: Table, what: str) -> list[str] | None:
    """Return the files of a table that is given by path; None for one in memory."""
    if not (isinstance(table, str | os.PathLike) or _is_paths(table)):
        return None
    return _found([table] if isinstance(table, str | os.PathLike) else table, what)


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"the {what} cannot be read: {_first_line(error)}; correct the file") from error


def _lazy(
    table: Table, what: str, wanted: Collection[str] | None, needed: Mapping[str, str] | None
) -> tuple[pl.LazyFrame, list[str] | None]:
    """Return the wanted columns of a table, and its files, if it is given by path."""
    files = files_of(table, what)
    if files is not None:
        lazy = _scan(files)
    elif isinstance(table, pl.LazyFrame):
        lazy = table
    else:
        lazy = _in_memory(table, what).lazy()
    names = lazy.collect_schema().names()
    if doubled := [name for name in names if name.endswith("_duplicated_0")]:
        raise _doubled(doubled[0].removesuffix("_duplicated_0"), what)
    check_names(names, needed or {}, what)
    return lazy.select([name for name in names if wanted is None or name in wanted]), files


def check_names(present: Collection[str], needed: Mapping[str, str], what: str) -> None:
    """Raise ValueError if a table lacks a column of a role."""
    for role, column in needed.items():
        if column not in present:
            advice = _other_text(present) or fields.nearest(column, present)
            raise ValueError(f"the {what} has no column {column!r} (schema: {role}); {advice}")


def _other_text(names: Collection[str]) -> str | None:
    """Return what to do about names that are those of a text in another encoding, or with another separator."""
    if any("\0" in name for name in names):
        return "it is not in UTF-8; write it so"
    only = next(iter(names)) if len(names) == 1 else ""
    mark = next((mark for mark in ";\t|" if mark in only), None)
    return f"its header {only!r} is separated by {mark!r}; write commas, or Parquet" if mark else None


def _is_paths(table: Table) -> bool:
    return isinstance(table, list | tuple) and bool(table) and all(isinstance(x, str | os.PathLike) for x in table)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _doubled(name: str, what: str) -> ValueError:
    return ValueError(f"the {what} has two columns {name!r}; rename or remove one")


def _in_memory(table: Table, what: str) -> pl.DataFrame:
    if isinstance(table, pl.DataFrame):
        return table
    columns = list(getattr(table, "column_names", getattr(table, "columns", ())))  # of pyarrow, of pandas
    for name in columns:
        if columns.count(name) > 1:
            raise _doubled(name, what)
    library = type(table).__module__.split(".")[0]
    try:
        if library == "pandas" and columns:
            return _of_pandas(table, what)
        if library == "pyarrow" and columns:
            return pl.DataFrame(pl.from_arrow(table))
        if isinstance(table, Mapping):
            return pl.DataFrame(table)
    except (pl.exceptions.PolarsError, TypeError, ImportError) as error:
        raise ValueError(f"the {what} cannot be converted to polars: {_first_line(error)}") from error
    raise ValueError(
        f"the {what} is a {type(table).__name__}; give a pandas, polars or pyarrow table, or the path of a CSV, "
        "Parquet or Arrow file"
    )


def _of_pandas(table: Any, what: str) -> pl.DataFrame:
    """Return a pandas table with the columns of a named index."""
    if any(name is not None for name in table.index.names):
        table = table.reset_index()
    try:
        return pl.from_pandas(table)
    except (pl.exceptions.PolarsError, TypeError, ValueError) as error:
        for name in table.columns:
            try:
                pl.from_pandas(table[[name]])
            except (pl.exceptions.PolarsError, TypeError, ValueError) as wrong:
                why = _first_line(wrong).rstrip(".")
                raise ValueError(
                    f"column {name!r} of the {what} has values of several types ({why}); use one"
                ) from wrong
        raise ValueError(f"the {what} cannot be converted to polars: {_first_line(error)}") from error


def _scan(files: list[str]) -> pl.LazyFrame:
    return _SCANS[str(min(str(_kind(file)) for file in files))](files)


def _found(paths: Sequence[str | os.PathLike], what: str) -> list[str]:
    """Return the files of some paths, all of a kind."""
    found = [file for path in paths for file in _files(str(path))]
    given = ", ".join(map(str, paths))
    if not found:
        raise ValueError(f"{given} is no file of the {what}; name a CSV, Parquet or Arrow file, a folder or a glob")
    kinds = {_kind(file) for file in found}
    if None in kinds:
        wrong = next(file for file in found if _kind(file) is None)
        raise ValueError(f"{wrong} of the {what} has an unknown ending; use one of {', '.join(_SCANS)}")
    readers = {_SCANS[str(kind)] for kind in kinds}
    if len(readers) > 1 and kinds != {".csv", ".csv.gz"}:
        raise ValueError(f"{given} holds files of several kinds ({', '.join(sorted(map(str, kinds)))}); name one kind")
    return found


def _files(path: str) -> list[str]:
    """Return the files of a path, a glob or a folder, in order."""
    if storage.is_remote(path):
        return _remote_files(path)
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return sorted(str(file) for file in Path(path).rglob("[!._]*") if file.is_file() and _kind(str(file)))
    if os.path.exists(path):
        return [path]
    return sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))


def _remote_files(address: str) -> list[str]:
    """Return copies on this machine of the files of an address, a glob or a folder, in order."""
    path = storage.path(address)
    if path.is_file():
        return [str(copies.local(path))]
    if not path.exists():  # a glob; a bucket's name has none
        given = storage.RemotePath(address)
        bucket = storage.path(address[: -len("/".join(given.parts[1:]))])
        return [str(copies.local(file)) for file in sorted(bucket.glob("/".join(given.parts[1:])))]
    here = copies.local(path)
    return sorted(str(file) for file in here.rglob("[!._]*") if file.is_file() and _kind(str(file)))


def _kind(path: str) -> str | None:
    return next((kind for kind in sorted(_SCANS, key=len, reverse=True) if path.lower().endswith(kind)), None)
