"""Values by name become the features that a table's column becomes."""

import numpy as np
import polars as pl
import pytest

from mmrf_jax.data import named_features
from mmrf_jax.data.readers.frame import features
from mmrf_jax.data.readers.frame.features import ColumnEncoder

ENCODERS = [
    ColumnEncoder("price", "number", (2.0,), (4.0,)),
    ColumnEncoder("views", "number", (1.0,), (0.5,), log=True),
    ColumnEncoder("made", "date", (19_000.0,), (30.0,)),
    ColumnEncoder("colour", "category", vocabulary=("blue", "red")),
    ColumnEncoder("tags", "categories", vocabulary=("a", "b")),
    ColumnEncoder("place", "vector", (0.0, 1.0), (1.0, 2.0)),
]
PLAIN = [{name: getattr(e, name) for name in ("name", "kind", "mean", "std", "log", "vocabulary")} for e in ENCODERS]
ROWS = [
    {"price": 3.0, "views": 40.0, "made": "2022-05-02", "colour": "red", "tags": ["b", "z"], "place": [1.0, 2.0]},
    {"price": None, "views": 0.0, "made": None, "colour": "green", "tags": [], "place": None},
    {"price": -1.0, "views": None, "made": "2021-01-01", "colour": None, "tags": ["a", "b"], "place": [0.5, 0.0]},
]


def test_it_encodes_as_tables_are():
    frame = pl.DataFrame(ROWS).with_columns(pl.col("made").str.to_date())
    wanted = features.encode_table(frame, ENCODERS)
    for row, expected in zip(ROWS, wanted, strict=True):
        np.testing.assert_allclose(named_features.encode_named(PLAIN, row), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prise": 1.0}, "no feature is called 'prise'; did you mean 'price'"),
        ({"price": "dear"}, "price='dear' is no number"),
        ({"price": float("nan")}, "price=nan is no number"),
        ({"made": "soon"}, "made='soon' is no date"),
        ({"tags": "a"}, r"tags='a' is no categories \(give a list\)"),
        ({"place": [1.0]}, r"place=\[1.0\] is no vector \(give 2 finite numbers\)"),
        ({"colour": ["red"]}, "is no category"),
    ],
)
def test_what_cannot_be_is_named(given, said):
    with pytest.raises(ValueError, match=said):
        named_features.encode_named(PLAIN, given)


def test_values_of_a_vocabulary_have_rows_and_others_have_row_0():
    texts, numbers = np.array(["a", "b", "bb"]), np.array([-3, 5, 2**40])
    assert [named_features.row_of(texts, x) for x in ("a", "b", "bb", "bbb", "", "c", None, 5)] == [
        1,
        2,
        3,
        0,
        0,
        0,
        0,
        0,
    ]
    assert [named_features.row_of(numbers, x) for x in (-3, 5, 2**40, 4, "5", "x", None, 2**70)] == [
        1,
        2,
        3,
        0,
        2,
        0,
        0,
        0,
    ]
    assert named_features.row_of(np.array(["7"]), 7) == 1 and named_features.row_of(np.zeros(0, np.str_), "a") == 0
