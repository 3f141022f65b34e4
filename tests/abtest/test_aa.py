"""A/A tests over hash assignments: intervals that are right cover zero, and those that are wrong are found out."""

import numpy as np
import pytest

from mmrf_jax.abtest import aa
from mmrf_jax.signals import SHORT_VIDEO


def users(n=2000, seed=0):
    rng = np.random.default_rng(seed)
    depth = 1 + rng.poisson(8, n)
    sums = {"user_id": np.arange(n), "watch_time": depth * rng.lognormal(0, 0.8, n), "depth": depth}
    return sums | {"like": rng.binomial(depth, 0.05), "hate": np.zeros(n)}


def test_intervals_of_users_cover_zero_as_often_as_they_say():
    result = aa.coverage(SHORT_VIDEO, users(), 500)
    assert result["tests"] == 500 and result["mismatches"] <= 0.01
    assert set(result["aa"]) == {"watch_time", "depth", "like"}  # no one hates: no difference in %
    assert result["left_out"] == {"hate": "too few: 0 users of A have any, an interval needs 25"}
    assert "| hate | too few: 0 users of A" in aa.format_aa(result)
    for metric, entry in result["aa"].items():
        assert 0.93 <= entry["coverage"] <= 0.97, metric
    assert "| like | 0.9" in aa.format_aa(result)


def test_rows_that_are_not_independent_are_found_out():
    """Every row twice, so that intervals are too narrow by √2: coverage P(|z| < 1.96 / √2) = .834."""
    twice = {key: np.repeat(values, 2) for key, values in users().items()}
    assert aa.coverage(SHORT_VIDEO, twice, 500)["aa"]["watch_time"]["coverage"] == pytest.approx(0.834, abs=0.05)


def test_a_covariate_narrows_the_intervals_and_keeps_their_coverage():
    sums = users()
    plain = aa.coverage(SHORT_VIDEO, sums, 500)["aa"]["watch_time"]
    adjusted = aa.coverage(SHORT_VIDEO, sums, 500, sums["depth"] + np.random.default_rng(1).normal(0, 1, 2000))["aa"][
        "watch_time"
    ]
    assert adjusted["half_width"] < 0.95 * plain["half_width"] and 0.93 <= adjusted["coverage"] <= 0.97


def test_no_tests_are_refused():
    with pytest.raises(ValueError, match="0 A/A tests"):
        aa.coverage(SHORT_VIDEO, users(10), 0)


def test_empty_groups_are_named():
    few = {name: values[:3] for name, values in users().items()}
    with pytest.raises(ValueError, match=r"arm '[AB]' has [01] users, intervals need at least 2; use more sessions"):
        aa.coverage(SHORT_VIDEO, few, 50)
    result = aa.coverage(SHORT_VIDEO, {name: values[:30] for name, values in users().items()}, 20)
    assert result["aa"] == {} and set(result["left_out"]) == {"watch_time", "depth", "like", "hate"}
