"""Sorting a frame of any size by an integer key: files that are sorted each, and cuts between which all are read.

The frame is written as runs, one file for each piece that was sorted in memory. `cut` divides the keys so that about as
many rows lie between any two cuts, and `read_part` brings together the rows of all runs between two cuts. Rows of one
key are never divided.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import polars as pl

from mmrf_jax.data.readers.kuairand.job import appearing

_BATCH_ROWS = 16_384  # what is read of a file at least
_SAMPLES = 1_024  # of the keys of a part, by which keys are cut


def write_run(frame: pl.DataFrame, path: pathlib.Path) -> None:
    """Writes a frame, sorted by its key, as a run; the file appears whole."""
    with appearing(path) as temporary:
        # a third of the bytes, for which the disk is waited for longer than lz4 takes
        frame.write_ipc(temporary, compression="lz4", record_batch_size=_BATCH_ROWS)


def cut(runs: Sequence[pathlib.Path], key: str, rows: int) -> np.ndarray:
    """Cuts runs into parts of about `rows` rows, or of one key where that has more.

    Returns:
      [runs, parts + 1] int64: the first row of each part in each run, and the run's number of rows.
    """
    step = max(1, rows // _SAMPLES)
    with ThreadPoolExecutor(2) as threads:  # keys may be too many to be held, so they are read twice

        def of_each(function: Callable[[np.ndarray], Any]) -> list:
            return list(threads.map(lambda run: function(read_column([run], key).to_numpy()), runs))

        sample = np.sort(np.concatenate(of_each(lambda keys: keys[step // 2 :: step].copy())))
        every = rows // step
        first = np.unique(sample[every : max(len(sample) - every // 2, 0) : every])
        return np.array(of_each(lambda keys: [0, *np.searchsorted(keys, first), len(keys)]))


def read_column(files: Sequence[pathlib.Path], name: str) -> pl.Series:
    """A column of frames that were written one after the other."""
    # paths are no patterns; ids are Int64 in some files where they are too large for the Int32 of the others
    columns = [pl.scan_ipc(path, glob=False).select(name) for path in files]
    return pl.concat(columns, how="vertical_relaxed").collect()[name]


def read_part(runs: Sequence[pathlib.Path], cuts: np.ndarray, part: int) -> pl.DataFrame:
    """All rows of a part: run after run, each in its order. `cuts`: see `cut`."""
    bounds = [(run, int(start), int(end)) for run, (start, end) in zip(runs, cuts[:, part : part + 2], strict=True)]
    filled = [of for of in bounds if of[2] > of[1]] or bounds[:1]
    pieces = pl.collect_all([pl.scan_ipc(run, glob=False).slice(start, end - start) for run, start, end in filled])
    # rows are gathered from one piece seven times as fast as from a hundred
    return pl.concat(pieces, how="vertical_relaxed", rechunk=True)
