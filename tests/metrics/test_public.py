"""`mmrf.metrics.gauc` and `xauc`: scikit-learn and SciPy by group, what is undefined, nonsense."""

import dataclasses
import itertools
import math
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from mmrf_jax.metrics import gauc, xauc


def assert_same(found, wanted):
    """Assert that two estimates are equal, with NaN where there is no effective sample size."""
    np.testing.assert_equal(dataclasses.astuple(found), dataclasses.astuple(wanted))


BOTH = pytest.mark.parametrize("metric", [gauc, xauc])


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    group = rng.integers(0, 40, 1200)
    score = rng.integers(0, 9, 1200) / 8  # with ties
    return (rng.random(1200) < 0.2 + 0.5 * score).astype(int), score, group


def test_one_group_is_scikit_learns_auc_and_scipys_rank_sum(rows):
    label, score, _ = rows
    found = gauc(label, score, np.zeros(1200, int))
    assert found.value == pytest.approx(roc_auc_score(label, score), abs=1e-12) and found.n == 1
    rank_sum = stats.mannwhitneyu(score[label == 1], score[label == 0]).statistic
    assert found.value == pytest.approx(rank_sum / (label.sum() * (1 - label).sum()), abs=1e-12)
    # Pairs by target without its ties: SciPy's Somers' D of the score, given the target.
    seconds = np.random.default_rng(1).integers(0, 30, 1200)
    somers = stats.somersd(seconds, score).statistic
    assert xauc(seconds, score, ["u"] * 1200).value == pytest.approx((somers + 1) / 2, abs=1e-12)
    assert xauc(label, score, rows[2]).value == pytest.approx(gauc(label, score, rows[2]).value, abs=1e-12)


def test_gauc_is_scikit_learns_by_group(rows):
    label, score, group = rows
    of = {g: (label[group == g], score[group == g]) for g in np.unique(group)}
    wanted = np.average([roc_auc_score(*x) for x in of.values()], weights=[len(x[0]) for x in of.values()])
    found = gauc(label, score, group)
    assert found.value == pytest.approx(wanted, abs=1e-12) and found.n == 40 and found.low < wanted < found.high
    assert_same(gauc(label, score, [(g, "any hashable") for g in group]), found)


def test_xauc_is_the_share_of_pairs(rows):
    _, score, group = rows
    seconds, values, weights = np.round(np.random.default_rng(3).exponential(size=1200), 1), [], []
    for g in np.unique(group):
        s, t = score[group == g], seconds[group == g]
        pairs = [(i, j) for i, j in itertools.combinations(range(len(s)), 2) if t[i] != t[j]]
        values.append(np.mean([0.5 if s[i] == s[j] else float((s[i] < s[j]) == (t[i] < t[j])) for i, j in pairs]))
        weights.append(len(s))
    assert xauc(seconds, score, group).value == pytest.approx(np.average(values, weights=weights), abs=1e-12)


def test_intervals_are_those_of_a_loop_over_drawn_groups(rows):
    """Of equal groups, so that the bootstrap's quantiles are those of means of AUCs."""
    rng = np.random.default_rng(2)
    group, score, label = np.repeat(np.arange(200), 10), rng.random(2000), np.tile([0, 1], 1000)
    found = gauc(label, score, group, draws=4000)
    per_group = np.array([roc_auc_score(label[group == g], score[group == g]) for g in range(200)])
    error = per_group.std() / math.sqrt(200)
    assert (found.low, found.high) == pytest.approx(
        (per_group.mean() - 1.96 * error, per_group.mean() + 1.96 * error), abs=3e-3
    )
    narrow = gauc(label, score, group, draws=4000, level=0.5)
    assert found.low < narrow.low < found.value < narrow.high < found.high
    assert_same(gauc(label, score, group, draws=4000), found)


@BOTH
@pytest.mark.parametrize("make", [list, tuple, pd.Series, pl.Series, lambda x: np.asarray(x, object)])
def test_columns_of_any_kind(rows, metric, make):
    wanted = metric(*rows)
    assert_same(metric(*(make(x.tolist()) for x in rows)), wanted)
    assert_same(metric(rows[0].astype(bool), rows[1].astype(np.float16), rows[2].astype(str)), wanted)
    small = (rows[0].astype(np.uint8), (8 * rows[1]).astype(np.int8), pd.Series(rows[2]).astype("category"))
    assert_same(metric(*small), wanted)


def test_large_integers_and_infinities_are_in_order():
    """Scores beyond 2^53 differ by 1, which float64 cannot tell."""
    assert gauc([0, 1], [2**53, 2**53 + 1], [0, 0]).value == 1.0
    assert xauc(np.array([2**62, 2**62 + 1]), [0.0, 1.0], [0, 0]).value == 1.0
    assert gauc([0, 1, 1], [-math.inf, 0.0, math.inf], [0, 0, 0]).value == 1.0
    assert xauc([0.0, 1.0, math.inf], [-math.inf, 0.0, 1.0], [0, 0, 0]).value == 1.0


UNDEFINED = {
    "no rows": ([], [], [], math.nan, "no rows"),
    "one row": ([1], [0.5], ["u"], math.nan, "no group has"),
    "constant labels": ([1] * 60, np.arange(60), np.arange(60) // 2, math.nan, "no group has"),
    "a row a group": ([0, 1] * 30, np.arange(60), np.arange(60), math.nan, "no group has"),
    "one group": ([0, 1] * 30, np.arange(60), ["u"] * 60, 31 / 60, "no interval: 1 groups count, it needs 25"),
    "24 groups": ([0, 1] * 24, [0, 1] * 24, np.arange(48) // 2, 1.0, "no interval: 24 groups count"),
    "all scores tied": ([0, 1] * 5, [0.3] * 10, [0] * 10, 0.5, "no interval: 1 groups count"),
}


@BOTH
@pytest.mark.parametrize(("label", "score", "group", "value", "note"), UNDEFINED.values(), ids=UNDEFINED)
def test_what_is_undefined_is_nan_with_a_reason(metric, label, score, group, value, note):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metric(label, score, group)
    assert found.value == pytest.approx(value, nan_ok=True) and math.isnan(found.low) and math.isnan(found.high)
    assert note in found.note and "\n" not in str(found) + repr(found)


@BOTH
def test_a_group_of_many_rows(metric):
    n = 300_000
    label, group = np.arange(n) % 2, np.zeros(n, np.int8)
    assert metric(label, label, group).value == 1.0 and metric(label, -label, group).value == 0.0
    assert metric(label, np.zeros(n), group).value == 0.5


NONSENSE = {
    "score nan": (
        ([0, 1], [0.5, math.nan], [0, 0]),
        {},
        "y_score has 1 numbers that are not finite, first nan in row 1",
    ),
    "label nan": (([0, math.nan], [0.5, 0.1], [0, 0]), {}, "y_true has 1 numbers that are not finite"),
    "label none": (([0, None], [0.5, 0.1], [0, 0]), {}, "y_true has a row that is no number"),
    "label text": ((["0", "1"], [0.5, 0.1], [0, 0]), {}, "y_true is of <U1"),
    "score length": (([0, 1], [0.5], [0, 0]), {}, r"y_score has shape \(1,\) and y_true \(2,\)"),
    "score 2-d": (([0, 1], [[0.5], [0.1]], [0, 0]), {}, r"y_score has shape \(2, 1\) and y_true \(2,\)"),
    "group length": (([0, 1], [0.5, 0.1], [0]), {}, "group has 1 ids for 2 rows"),
    "no group": (([0, 1], [0.5, 0.1], None), {}, "group is None; give one hashable id for each row"),
    "no id": (([0, 1], [0.5, 0.1], ["a", None]), {}, "group of row 1 is None; leave out rows without an id"),
    "level": (([0, 1], [0.5, 0.1], [0, 0]), {"level": 1.0}, "level=1.0 must be a coverage between 0 and 1"),
    "draws": (([0, 1], [0.5, 0.1], [0, 0]), {"draws": 1.5}, "draws=1.5 must be the number of bootstrap samples"),
    "seed": (([0, 1], [0.5, 0.1], [0, 0]), {"seed": "x"}, "seed='x' must be an integer"),
}


@BOTH
@pytest.mark.parametrize(("given", "options", "message"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused_in_one_line(metric, given, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        metric(*given, **options)
    assert "\n" not in str(caught.value)


def test_labels_are_0_or_1():
    with pytest.raises(ValueError, match="y_true of row 1 is -1; labels are 0 or 1"):
        gauc([1, -1], [0.5, 0.1], [0, 0])
