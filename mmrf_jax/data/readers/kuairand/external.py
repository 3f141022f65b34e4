"""External sort of a frame of any size by an integer key: sorted files, and cuts that divide them into parts.

The frame is written as runs, one file per piece sorted in memory. `cut` divides the keys so that about as many rows lie
between any two cuts, and `read_part` collects the rows of all runs between two cuts. Rows of one key stay together.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import polars as pl

from mmrf_jax.data.readers.kuairand.job import appearing

_BATCH_ROWS = 16_384  # smallest number of rows to read from a file
_SAMPLES = 1_024  # keys sampled per part, to place the cuts


def write_run(frame: pl.DataFrame, path: pathlib.Path) -> None:
    """Write a frame, sorted by its key, as a run; the file appears atomically."""
    with appearing(path) as temporary:
        # A third of the bytes; the disk would take longer than lz4 does.
        frame.write_ipc(temporary, compression="lz4", record_batch_size=_BATCH_ROWS)


def cut(runs: Sequence[pathlib.Path], key: str, rows: int) -> np.ndarray:
    """Cut runs into parts of about `rows` rows, or of one key if it has more.

    Returns:
      [runs, parts + 1] int64: the first row of each part in each run, and the run's number of rows.
    """
    step = max(1, rows // _SAMPLES)
    with ThreadPoolExecutor(2) as threads:  # the keys may not fit in memory, so they are read twice

        def of_each(function: Callable[[np.ndarray], Any]) -> list:
            return list(threads.map(lambda run: function(read_column([run], key).to_numpy()), runs))

        sample = np.sort(np.concatenate(of_each(lambda keys: keys[step // 2 :: step].copy())))
        every = rows // step
        first = np.unique(sample[every : max(len(sample) - every // 2, 0) : every])
        return np.array(of_each(lambda keys: [0, *np.searchsorted(keys, first), len(keys)]))


def read_column(files: Sequence[pathlib.Path], name: str) -> pl.Series:
    """Read a column of frames that were written one after another."""
    # Paths are not patterns. Ids are Int64 in some files if they are too large for the Int32 of the others.
    columns = [pl.scan_ipc(path, glob=False).select(name) for path in files]
    return pl.concat(columns, how="vertical_relaxed").collect()[name]


def read_part(runs: Sequence[pathlib.Path], cuts: np.ndarray, part: int) -> pl.DataFrame:
    """Read all rows of a part: run after run, each in its order; see `cut` for `cuts`."""
    bounds = [(run, int(start), int(end)) for run, (start, end) in zip(runs, cuts[:, part : part + 2], strict=True)]
    filled = [of for of in bounds if of[2] > of[1]] or bounds[:1]
    pieces = pl.collect_all([pl.scan_ipc(run, glob=False).slice(start, end - start) for run, start, end in filled])
    # Gathering rows from one piece is seven times as fast as from a hundred.
    return pl.concat(pieces, how="vertical_relaxed", rechunk=True)
