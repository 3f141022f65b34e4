"""Tables from files."""

import polars as pl
import pytest

from mmrf_jax.data.readers.frame import tables


@pytest.mark.parametrize("folder", ["x[3]", "x[1:3]", "a b", "st*r?", "{0}", "%d"])
def test_names_that_look_like_patterns_are_names(folder, tmp_path):
    frame = pl.DataFrame({"a": [1, 2]})
    (tmp_path / folder).mkdir()
    for name, write in (("x.csv", frame.write_csv), ("y.parquet", frame.write_parquet), ("z.arrow", frame.write_ipc)):
        write(tmp_path / folder / name)
        assert tables.read_table(tmp_path / folder / name, "log").equals(frame)
