"""Features of columns of any type, against values that were computed without it."""

import datetime

import numpy as np
import polars as pl
import pytest

from mmrf_jax.data.readers.frame import features
from mmrf_jax.data.readers.frame.notes import Notes

TRAIN = np.array([True, True, True, False])


def encoded(values, in_train=TRAIN, **options):
    frame, notes = pl.DataFrame({"x": pl.Series(values, strict=False, **options)}), Notes()
    made = features.fit_encoders(frame, ["x"], in_train, notes, "item")
    return made, features.encode_table(frame, made), notes


def test_numbers_are_standardised_on_the_training_rows():
    made, x, _ = encoded([1.0, 3.0, None, 9.0])
    assert made[0].kind == "number" and made[0].mean == (2.0,) and made[0].std == (1.0,)
    np.testing.assert_array_equal(x[:, 0], [-1, 1, 0, 7])


@pytest.mark.parametrize("odd", [float("inf"), float("-inf"), float("nan"), None])
def test_what_is_no_finite_number_is_the_average(odd):
    _, x, _ = encoded([1.0, 3.0, odd, odd])
    np.testing.assert_array_equal(x[:, 0], [-1, 1, 0, 0])
    _, x, _ = encoded([[1.0, 0.0], [3.0, 0.0], [odd, 0.0], [odd, 0.0]])
    np.testing.assert_array_equal(x, [[-1, 0], [1, 0], [0, 0], [0, 0]])


def test_counts_with_a_heavy_tail_enter_as_logarithms():
    made, x, _ = encoded([0, 0, 1_000, 1_000])
    raw = np.log1p([0, 0, 1_000, 1_000])
    assert made[0].log
    np.testing.assert_allclose(x[:, 0], (raw - raw[:3].mean()) / raw[:3].std(), rtol=1e-6)


def test_flags_and_dates():
    _, x, _ = encoded([True, False, True, None])
    np.testing.assert_allclose(x[:, 0], [2**-0.5, -(2**0.5), 2**-0.5, 0], rtol=1e-6)
    days = [datetime.date(2024, 5, day) for day in (1, 2, 3, 5)]
    _, x, _ = encoded(days)
    np.testing.assert_allclose(x[:, 0], np.array([-1, 0, 1, 3]) / np.std([1, 2, 3]), rtol=1e-5)


def test_categories_are_one_hot_with_other_and_nothing_for_none():
    made, x, _ = encoded(["a", "b", None, "new"])
    assert made[0].vocabulary == ("a", "b")
    np.testing.assert_array_equal(x, [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]])


def test_rare_categories_are_other():
    values = [f"v{i:02d}" for i in range(40)] * 3 + ["rare"]
    made, x, _ = encoded(values, np.ones(121, bool))
    assert len(made[0].vocabulary) == features.MAX_ONE_HOT and x[-1].tolist() == [0] * features.MAX_ONE_HOT + [1]


def test_lists_of_categories_are_several_hot():
    made, x, _ = encoded([["a", "b"], ["a"], None, ["b", "new", "b"]])
    assert made[0].vocabulary == ("a", "b")
    np.testing.assert_array_equal(x, [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1]])


@pytest.mark.parametrize("kind", ["list", "array", "json"])
def test_vectors_are_standardised_by_dimension(kind):
    rows = [[0.0, 4.0], [2.0, 4.0], None, [3.0, 5.0]]
    if kind == "json":
        made, x, _ = encoded([None if row is None else str(row) for row in rows])
    else:
        made, x, _ = encoded(rows, dtype=pl.List(pl.Float64) if kind == "list" else pl.Array(pl.Float32, 2))
    assert made[0].kind == "vector"
    np.testing.assert_array_equal(x, [[-1, 0], [1, 0], [0, 0], [2, 1]])


def test_columns_that_are_no_features_are_named():
    *_, notes = encoded([f"title {i}" for i in range(50)], np.ones(50, bool))
    assert notes.assumed == ["item column x is no feature: 50 different texts of 50"]
    *_, notes = encoded([None, None, None, 1.0])
    assert notes.assumed == ["item column x is no feature: it is empty in the training days"]
    *_, notes = encoded([[1.0], [1.0, 2.0], None, None])
    assert notes.assumed == ["item column x is no feature: its vectors have 1 to 2 numbers"]


def test_other_tables_are_encoded_as_they_were_fitted():
    made, _, _ = encoded([1.0, 3.0, None, 9.0])
    np.testing.assert_array_equal(features.encode_table(pl.DataFrame({"x": [2.0, 4.0]}), made), [[0], [2]])
    with pytest.raises(ValueError, match="the table has no column 'x', which the features need"):
        features.encode_table(pl.DataFrame({"y": [2.0]}), made)
