"""Means and intervals over seeds, by hand."""

import numpy as np
import pytest

from mmrf_jax.sweeps import seeds

BY_SEED = [
    {"a": {"watch_time": 100.0, "hate": 0.0}, "b": {"watch_time": 110.0, "hate": 0.1}},
    {"a": {"watch_time": 200.0, "hate": 0.0}, "b": {"watch_time": 210.0, "hate": 0.2}},
    {"a": {"watch_time": 400.0, "hate": 0.0}, "b": {"watch_time": 480.0, "hate": 0.3}},
]


def test_differences_are_paired_within_seeds():
    """10, 5 and 20 %: mean 11.67, standard deviation 7.64, and 4.303 is Student's quantile of two degrees."""
    table = seeds.across_seeds(BY_SEED, "a")
    entry = table["b"]["watch_time"]
    assert entry["mean"] == pytest.approx(800 / 3) and entry["by_seed"] == [110.0, 210.0, 480.0]
    assert entry["diff_pct"] == pytest.approx(35 / 3)
    half = 4.30265 * 7.63763 / np.sqrt(3)
    assert entry["ci95"] == pytest.approx([35 / 3 - half, 35 / 3 + half], rel=1e-5)
    assert table["a"]["watch_time"]["diff_pct"] == 0.0 and table["a"]["watch_time"]["ci95"] == [0.0, 0.0]


def test_an_arm_can_have_a_reference_of_its_own():
    by_seed = [{**seed, "c": {"watch_time": 0.5 * seed["b"]["watch_time"], "hate": 0.0}} for seed in BY_SEED]
    table = seeds.across_seeds(by_seed, "a", {"c": "b"})
    assert table["c"]["watch_time"]["diff_pct"] == pytest.approx(-50.0)
    assert table["b"] == seeds.across_seeds(by_seed, "a")["b"]


def test_nothing_is_compared_with_zero():
    assert seeds.across_seeds(BY_SEED, "a")["b"]["hate"] == {
        "mean": pytest.approx(0.2),
        "diff_pct": None,
        "ci95": None,
        "note": "none: the reference is 0",
        "by_seed": [0.1, 0.2, 0.3],
    }
    for wrong in ([], BY_SEED):
        with pytest.raises(ValueError, match="reference 'c'"):
            seeds.across_seeds(wrong, "c")


@pytest.mark.parametrize("number", [1, 2])
def test_intervals_that_events_cannot_carry_of_fewer_than_three_seeds(number):
    entry = seeds.across_seeds(BY_SEED[:number], "a")["b"]["watch_time"]
    assert entry["diff_pct"] == pytest.approx([10.0, 7.5][number - 1]) and entry["ci95"] is None
    assert entry["note"] == f"too few seeds: {number}, an interval needs 3"
    text = seeds.format_seeds(seeds.across_seeds(BY_SEED[:number], "a"), ["watch_time"])
    assert " %, too few seeds) |" in text and "[" not in text


def test_intervals_that_events_cannot_carry_of_seeds_are_too_wide():
    """Differences of −60, +80 and +10 %: Student's interval would be [−164, +184]."""
    by_seed = [
        {"a": {"like": 1.0, "hate": 1.0}, "b": {"like": x, "hate": 1.0 + y}}
        for x, y in ((0.4, -0.9), (1.8, -0.1), (1.1, -0.5))
    ]
    table = seeds.across_seeds(by_seed, "a")
    assert table["b"]["like"]["ci95"] is None and table["b"]["like"]["note"] == "too wide: [-100, +184] says nothing"
    assert "| b | 1.1 (+10.00 %, too wide) |" in seeds.format_seeds(table, ["like"])
    assert table["b"]["hate"]["ci95"] is None  # [−149, +49], cut at −100
    surely = seeds.across_seeds([{"a": {"x": 1.0}, "b": {"x": x}} for x in (0.02, 0.12, 0.25)], "a")["b"]["x"]
    assert surely["ci95"][0] == -100.0 and surely["ci95"][1] < -50  # not below what there can be
    signed = seeds.across_seeds([{"a": {"x": 1.0}, "b": {"x": x}} for x in (-0.6, -0.5, -0.45)], "a")["b"]["x"]
    assert signed["ci95"][0] < -100  # of what may be below 0


def test_bold_is_better_or_worse_by_metric():
    by_seed = [{"a": {"like": 1.0, "hate": 1.0}, "b": {"like": x, "hate": x}} for x in (1.5, 1.6, 1.55)]
    table = seeds.across_seeds(by_seed, "a")
    like, hate = seeds.format_seeds(table, ["like", "hate"]).splitlines()[-1].strip("| ").split(" | ")[1:]
    assert like.endswith("] better)") and hate.endswith("] worse)")
    errors = seeds.format_seeds(table, ["like"], lambda _: True)
    assert "] worse)" in errors and "better" not in errors


def test_what_a_seed_does_not_have_is_in_no_mean():
    by_seed = [{"a": {"gauc": 0.6}, "b": {"gauc": None}}, {"a": {"gauc": None}, "b": {"gauc": 0.5}}]
    table = seeds.across_seeds(by_seed, "a")
    assert table["b"]["gauc"] == {
        "mean": None,
        "diff_pct": None,
        "ci95": None,
        "note": "none: a seed has no value",
        "by_seed": [None, 0.5],
    }
    assert seeds.format_seeds(table, ["gauc"]).split("\n")[2] == "| a | – |"
    complete = seeds.across_seeds([{"a": {"gauc": None}, "b": {"gauc": 0.5}}], "a")["b"]["gauc"]
    assert complete["mean"] == 0.5 and complete["diff_pct"] is None


def test_table_has_a_row_for_each_arm():
    lines = seeds.format_seeds(seeds.across_seeds(BY_SEED, "a"), ("watch_time", "hate")).split("\n")
    assert lines[0] == "| arm | watch_time | hate |" and lines[2] == "| a | 233.3 | 0 |"
    assert lines[3].startswith("| b | 266.7 (+11.67 % [-7.31, +30.64]) | 0.2 |")


def test_p_values_over_seeds_are_adjusted_for_the_number_of_arms():
    """Differences of 2, 3, 4 % (Student's t of 5.2) and of −1, 0, 4 %; the smaller p-value counts twice."""
    by_seed = [
        {"a": {"like": 1.0}, "b": {"like": 1.0 + x}, "c": {"like": 1.0 + y}, "d": {"like": 1.0 + x}}
        for x, y in ((0.02, -0.01), (0.03, 0.0), (0.04, 0.04))
    ]
    table = seeds.across_seeds(by_seed, "a")
    p = {"b": 0.035099, "c": 0.579584}  # two-sided, with two degrees of freedom: t = 5.19615 and 0.654654
    assert seeds.holm(table, "like", {"b": "a", "c": "a"}) == pytest.approx({"b": 2 * p["b"], "c": p["c"]}, rel=1e-3)
    assert seeds.holm(table, "like", {"b": "a", "d": "b"}) == pytest.approx({"b": p["b"]}, rel=1e-3)  # d is b
    few = seeds.across_seeds(by_seed[:2], "a")
    assert seeds.holm(few, "like", {"b": "a"}) == {}
