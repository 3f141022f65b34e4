"""The page of several runs: differences against hand-computed ones, and what it says of runs that are not alike."""

import math

import numpy as np
import pytest
from pages import NASTY, Page

from mmrf_jax.report import compare

WATCH = np.arange(1.0, 101.0)


def entry(diff, low, high):
    return {"mean": 1.0, "diff_pct": diff, "ci95": [low, high]}


def make_run(name="a", watch=WATCH, method="mmrf", arm=None, **config):
    same = {"watch_time": {"mean": 900.0, "diff_pct": 0.0, "ci95": [0.0, 0.0]}}
    arm = arm or {"watch_time": entry(10.0, 5.0, 15.0)}
    config = {"method": method, "source": "world", "seed": 0, "world": {"seed": 1}, "train": {"batch": 32}} | config
    users = {} if watch is None else {"watch_time": watch, "user_id": np.arange(len(watch))}
    rows = [{"step": i, "seed": 0, "phase": "train", "seconds": 1.0, "loss/click": 1.0 / i} for i in range(1, 5)]
    return compare.Run(name, config, {"ab_test": {"production": same, method: arm}}, rows, users=users)


def test_the_same_users_are_compared_one_by_one():
    """Every user watches 10 % longer: there is no doubt, however much the users differ."""
    one, other = make_run(), make_run("b", 1.1 * WATCH)
    diff, bounds, kind = compare.differences(one, other)["watch_time"]
    assert kind == "paired" and (diff, *bounds) == pytest.approx((10.0, 10.0, 10.0))


@pytest.mark.parametrize("change", [{"seed": 1}, {"world": {"seed": 2}}, {"ab_test": {"sessions": 9}}])
def test_other_users_are_independent(change):
    """The standard error of the logarithm of a ratio of means: the root of the summed squared relative errors."""
    diff, bounds, kind = compare.differences(make_run(), make_run("b", 1.1 * WATCH, **change))["watch_time"]
    half = 1.959964 * math.sqrt(2.0) * WATCH.std(ddof=1) / 10.0 / WATCH.mean()
    wanted = [100.0 * (1.1 * math.exp(sign * half) - 1.0) for sign in (-1, 1)]
    assert kind == "independent" and diff == pytest.approx(10.0) and bounds == pytest.approx(wanted, rel=1e-4)


def test_without_users_the_controls_are_between():
    """1.2 / 1.0, with half widths of ln 1.1 each, so of √2 ln 1.1 together."""
    one = make_run(
        watch=None, arm={"watch_time": entry(0.0, 100.0 / 1.1 - 100.0, 10.0), "hate": entry(1.0, -100.0, 9.0)}
    )
    other = make_run("b", arm={"watch_time": entry(20.0, 120.0 / 1.1 - 100.0, 32.0), "hate": entry(1.0, 0.5, 9.0)})
    found = compare.differences(one, other)
    spread = 1.1 ** math.sqrt(2.0)
    wanted = (20.0, 120.0 / spread - 100.0, 120.0 * spread - 100.0)
    diff, bounds, kind = found.pop("watch_time")
    assert kind == "by control" and (diff, *bounds) == pytest.approx(wanted) and not found  # −100 % has no logarithm


def test_what_is_on_the_page():
    runs = [make_run(), make_run("b", 1.1 * WATCH, method="bc", train={"batch": 64}), make_run("c", world={"seed": 2})]
    text = compare.build(runs, ["Of 40 runs these are shown."])
    found = Page(text)
    assert list(found.sections) == ["runs", "metrics", "curves-train", "configs"]
    assert "watch timeseconds per session11+10.00 % better[+10.00, +10.00]1" in found.sections["metrics"]
    assert "user by user" in found.sections["metrics"] and "independent" in found.sections["metrics"]
    assert "c is of another world than a (world.seed)" in text and "Of 40 runs these are shown." in text
    configs = found.sections["configs"]
    assert "methodmmrfbcmmrf" in configs and "train.batch326432" in configs and "world.seed112" in configs
    assert "3 of 5 fields." in configs
    assert "bbc is better than production: watch time +10.0 %" in found.sections["runs"]
    assert sum("data-root-id" in attributes for _, attributes in found.elements) == 2  # a difference, a curve


def test_runs_that_lack_something():
    text = compare.build([make_run(), compare.Run("b", make_run().config, {}, [])])
    assert "b has not ended, so it has no results." in text and "All of these runs have the same config" in text
    nothing = [compare.Run(name, make_run().config, {}, []) for name in "ab"]
    assert "None of these runs has an A/B test." in compare.build(nothing)


def test_offline_differences_add_their_errors():
    def of(name, value, low, high):
        return compare.Run(name, make_run().config, {"offline": {"click": {"gauc": value, "ci95": [low, high]}}}, [])

    runs = [of("a", 0.6, 0.57, 0.63), of("b", 0.7, 0.66, 0.74), of("c", None, None, None)]
    found = Page(compare.build(runs)).sections["offline"]
    assert "clicks0.6000[0.5700, 0.6300]0.7000+0.1000 better[+0.0500, +0.1500]–" in found  # 0.05 = √(0.03² + 0.04²)


def test_names_are_text():
    found = Page(compare.build([make_run(), make_run(NASTY, NASTY=NASTY)]))
    assert not any(tag == "img" for tag, _ in found.elements) and NASTY in found.sections["runs"]
