"""The sentence on a run, over all that its results can be."""

import math

import pytest

from mmrf_jax.report import verdict
from mmrf_jax.signals import SHORT_VIDEO, Signal, Signals

CONTROL = {"watch_time": {"mean": 900.0, "diff_pct": 0.0, "ci95": [0.0, 0.0]}}
NONE = {"mean": 0.001, "diff_pct": None, "ci95": None, "note": "too few: 3 users of mmrf have any"}


def entry(low, high):
    return {"mean": 1.0, "diff_pct": (low + high) / 2, "ci95": [low, high]}


def main(name):
    """The signals of a result whose main agent maximises one."""
    signals = SHORT_VIDEO.signals if name in SHORT_VIDEO.names else (Signal(name),)
    return Signals(signals, (name,)).as_dict()


def of(**metrics):
    return verdict.of_results({"ab_test": {"production": CONTROL, "mmrf": metrics, "random": metrics}}, "mmrf")


def test_better_and_no_guardrail_fell():
    found = of(watch_time=entry(4.0, 6.0), click=entry(-1.0, 1.0), coverage=entry(1.0, 2.0), hate=entry(-9.0, -7.0))
    assert found.sentence == (
        "mmrf is better than production: watch time +5.0 % [+4.0, +6.0]; no guardrail is significantly worse."
    )
    assert (found.outcome, found.metric, found.fallen, found.unknown) == ("better", "watch_time", (), ())


def test_guardrails_that_fell_are_named_with_their_direction():
    """Hates fall by rising; likes are no guardrail."""
    found = of(
        watch_time=entry(4.0, 6.0),
        click=entry(-19.0, -17.0),
        long_view=entry(-2.0, 2.0),
        coverage=entry(-20.0, -10.0),
        hate=entry(10.0, 30.0),
        like=entry(-50.0, -40.0),
    )
    assert found.fallen == ("click", "coverage", "hate") and found.outcome == "better"
    assert found.sentence.endswith("; worse on guardrails: clicks −18.0 %, catalogue coverage −15.0 %, hates +20.0 %.")


def test_worse():
    found = of(watch_time=entry(-6.0, -4.0))
    assert found.outcome == "worse"
    assert found.sentence == (
        "mmrf is worse than production: watch time −5.0 % [−6.0, −4.0]; no guardrail was measured."
    )


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ((-3.0, 5.0), "too small to tell differences below 5 %, use more sessions"),
        ((-8.0, 2.0), "too small to tell differences below 8 %"),
        ((-0.5, 0.9), "so any difference is below 1 %"),
        ((0.0, 0.0), "so any difference is below 1 %"),
    ],
)
def test_an_interval_around_zero_is_unclear_and_says_what_it_leaves_open(bounds, said):
    found = of(watch_time=entry(*bounds))
    assert found.outcome == "unclear" and said in found.sentence
    assert found.sentence.startswith("mmrf is not distinguishable from production: watch time ")


@pytest.mark.parametrize(
    "broken", [NONE, None, {"mean": 1.0, "diff_pct": math.nan, "ci95": [math.nan, 2.0]}, {"ci95": [None, None]}, {}]
)
def test_no_interval_of_the_main_metric_is_too_small(broken):
    found = of(watch_time=broken, hate=NONE, click={"ci95": [math.nan, math.nan], "diff_pct": math.nan})
    assert found.outcome == "unclear" and found.unknown == ("click", "hate")
    why = "too few: 3 users of mmrf have any" if broken is NONE else "it has no interval"
    assert f"not distinguishable from production: too small to compare watch time ({why})" in found.sentence
    assert found.sentence.endswith("no guardrail is significantly worse (too few events for clicks and hates).")


def test_a_main_metric_that_should_fall():
    arms = {"production": CONTROL, "mmrf": {"hate": entry(-9.0, -7.0), "click": entry(-3.0, -2.0)}}
    found = verdict.of_results({"ab_test": arms, "signals": main("hate")}, "mmrf")
    assert found.outcome == "better" and found.fallen == ("click",)


def against(**rivals):
    """An offline entry whose differences to the rankers have these intervals."""
    made = {n: {"diff": b and sum(b) / 2, "diff_ci95": b and list(b)} for n, b in rivals.items()}
    return {"gauc": 0.6, "ci95": [0.5, 0.7], "against": made}


@pytest.mark.parametrize(
    ("popularity", "boosting", "outcome", "said"),
    [
        ((0.01, 0.03), (0.01, 0.02), "better", "better than popularity (+0.0200 [+0.0100, +0.0300]) and better than b"),
        ((0.01, 0.03), (-0.01, 0.02), "unclear", "and not distinguishable from boosting (+0.0050 [−0.0100, +0.0200])"),
        ((0.01, 0.03), (-0.03, -0.01), "worse", "and worse than boosting (−0.0200 [−0.0300, −0.0100])"),
        ((0.01, 0.03), None, "unclear", "not distinguishable from boosting (too few users)"),
    ],
)
def test_logs_are_compared_with_popularity_and_boosting(popularity, boosting, outcome, said):
    results = {
        "offline": {
            "watch_time_xauc": against(popularity=popularity, boosting=boosting, logistic=(-0.5, -0.4)),
            "click": against(popularity=(-0.02, -0.01), boosting=(-0.02, -0.01)),
            "long_view": against(popularity=(0.01, 0.02), boosting=(-0.02, -0.01)),
            "hate": against(popularity=None, boosting=None),
        }
    }
    found = verdict.of_results(results, "mmrf")
    assert found.sentence.startswith("By watch time (XAUC), mmrf is ") and said in found.sentence
    assert (found.outcome, found.metric) == (outcome, "watch_time_xauc")
    assert found.fallen == ("click", "long_view") and found.unknown == ("hate",)
    fell = "GAUC of clicks (than popularity and boosting), GAUC of long views (than boosting)"
    assert found.sentence.endswith(f"; worse on guardrails: {fell} (too few events for hates).")


def test_a_main_signal_of_its_own_and_a_single_baseline():
    found = verdict.of_results(
        {"offline": {"purchase": against(popularity=(0.01, 0.02))}, "signals": main("purchase")}, "bc"
    )
    assert found.outcome == "better" and found.metric == "purchase"
    assert found.sentence.startswith("By purchase (GAUC), bc is better than popularity (+0.0150")


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ({}, "No verdict yet: the run has not ended."),
        ({"train": {}}, "No verdict: mmrf was not compared with production, popularity or boosting."),
        ({"ab_test": {}, "offline": {}}, "No verdict: mmrf was"),
        ({"ab_test": {"production": CONTROL}}, "No verdict: mmrf was"),
        ({"ab_test": {"mmrf": CONTROL}}, "No verdict: mmrf was"),
        ({"ab_test": {"production": CONTROL, "bc": CONTROL}}, "No verdict: mmrf was"),
        ({"offline": {"watch_time_xauc": {"gauc": 0.6}}}, "No verdict: mmrf was"),
    ],
)
def test_missing_parts_give_no_verdict(results, said):
    found = verdict.of_results(results, "mmrf")
    assert found.outcome == "none" and found.sentence.startswith(said) and not found.metric
