"""What an A/B test is said to have found."""

import numpy as np
from in_memory import compare_sums

from mmrf_jax.abtest import summary
from mmrf_jax.signals import SHORT_VIDEO


def result(**more):
    rng = np.random.default_rng(0)
    arms = {arm: {"watch_time": rng.lognormal(shift, 1, 500)} for arm, shift in (("production", 0.0), ("mmrf", 1.0))}
    return compare_sums(SHORT_VIDEO, arms, "production", paired=False) | {"truncated_pct": {"mmrf": 1.23456}} | more


def analysis(users, low, high):
    interval = {"mean": 1.0, "diff_pct": (low + high) / 2, "ci95": [low, high], "always_valid95": [low, high]}
    control = interval | {"diff_pct": 0.0, "always_valid95": [0.0, 0.0]}
    arms = {"production": {"watch_time": control}, "mmrf": {"watch_time": interval}}
    return {"users": dict.fromkeys(arms, users), "ab_test": arms}


def test_a_sample_ratio_that_is_wrong_is_a_warning():
    assert "not applicable, every arm has the same users" in summary.describe(result())
    fine = summary.describe(result(sample_ratio_mismatch={"users": {"production": 500, "mmrf": 500}, "p_value": 1.0}))
    assert "p = 1.0000" in fine and "WARNING" not in fine and "{'mmrf': 1.235}" in fine
    wrong = summary.describe(result(sample_ratio_mismatch={"users": {"production": 500, "mmrf": 300}, "p_value": 1e-9}))
    assert "WARNING: sample ratio mismatch (p < 0.001)" in wrong


def test_the_look_that_would_have_been_enough():
    text = summary.describe(
        result(interim_analyses=[analysis(10, -5.0, 9.0), analysis(20, 1.0, 5.0), analysis(30, 1.5, 4.0)])
    )
    assert "+2.75 % [+1.50, +4.00]; leaves zero out from interim analysis 2 of 3 on, 20 users" in text
    text = summary.describe(result(interim_analyses=[analysis(10, -5.0, 9.0)]))
    assert "holds zero at all 1 interim analyses" in text and "production, watch_time, always" not in text


def test_intervals_that_events_cannot_carry_are_said_in_words():
    rng = np.random.default_rng(1)
    arms = {
        arm: {"watch_time": rng.lognormal(0, 1, 64), "depth": np.full(64, 50), "forward": rng.poisson(0.1, 64)}
        for arm in ("production", "mmrf")
    }
    found = compare_sums(SHORT_VIDEO, arms, "production", paired=False) | {"truncated_pct": {"mmrf": 0.0}}
    text = summary.describe(found)
    assert "no interval (25 users of each arm need to have any) — too few: forward of mmrf" in text
    assert "Too small to tell mmrf from production by watch_time" in text
    assert "Too small" not in summary.describe(result()) and "no interval" not in summary.describe(result())
    analyses = [analysis(10, 1.0, 2.0), analysis(20, 1.0, 2.0)]
    for one in analyses:
        one["ab_test"]["mmrf"]["watch_time"] |= {"diff_pct": None, "always_valid95": None, "note": "too few: 3 users"}
    assert "mmrf, watch_time, always valid at the end: too few" in summary.describe(result(interim_analyses=analyses))
    halves = {"early": None, "late": None, "change": None, "ci95": None, "note": "too few: 3 users"}
    halves_of = {"mmrf": dict.fromkeys(("watch_time", "depth", "visits", "watch_time_per_day"), halves)}
    assert "| mmrf | depth | – | – | too few |" in summary.describe(result(novelty_effect=halves_of))
