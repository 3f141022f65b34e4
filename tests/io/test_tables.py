"""Markdown tables."""

import doctest

import pytest

from mmrf_jax.io import tables


def test_example_prints_what_it_says():
    found = doctest.testmod(tables)
    assert found.attempted and not found.failed


def test_a_row_has_as_many_cells_as_the_header():
    assert tables.markdown(["a"], []) == "| a |\n|---|"
    with pytest.raises(ValueError, match=r"row \['1'\] has 1 cells, the header \['a', 'b'\] 2"):
        tables.markdown(["a", "b"], [["1"]])
