"""The change of an effect over days: values by hand, intervals by their coverage."""

import numpy as np
import pytest
from in_memory import compare_sums

from mmrf_jax.abtest import by_day, statistics
from mmrf_jax.signals import SHORT_VIDEO


def part(rng, taste, lift):
    """Sums of users who come more or less often, by taste."""
    sessions = rng.poisson(2 * np.exp(0.3 * taste))
    seconds = lift * sessions * np.exp(taste + rng.normal(0, 0.5, len(taste)))
    return {"sessions": sessions, "watch_time": seconds, "user_days": np.full(len(taste), 3)}


def parts(rng, n, lifts, paired):
    """(early, late) of production and mmrf."""
    taste = rng.normal(0, 0.7, n)
    tastes = {"production": taste, "mmrf": taste if paired else rng.normal(0, 0.7, n)}
    return [{arm: part(rng, x, 1.0 if arm == "production" else lift) for arm, x in tastes.items()} for lift in lifts]


def test_values_by_hand(monkeypatch):
    monkeypatch.setattr(statistics, "MIN_EVENTS", 1)

    def one(*seconds):
        return {"watch_time": np.array(seconds), "sessions": np.array([1, 1, 2])}

    early = {"production": one(1.0, 2.0, 5.0), "mmrf": one(3.0, 2.0, 5.0)}
    late = {"production": one(2.0, 2.0, 6.0), "mmrf": one(2.0, 3.0, 6.0)}
    result = by_day.novelty_effect(SHORT_VIDEO, early, late, "production", paired=False)
    entry = result["mmrf"]["watch_time"]
    assert (entry["early"], entry["late"], entry["change"]) == pytest.approx((25.0, 10.0, -15.0))

    # A user's share in a difference: (seconds − mean × sessions) / mean sessions / control's mean.
    def share(x, mean, base):
        return (x["watch_time"] - mean * x["sessions"]) * 3 / 4 / base

    own = share(late["mmrf"], 2.75, 2.5) - share(early["mmrf"], 2.5, 2.0)
    other = share(late["production"], 2.5, 2.5) * 1.1 - share(early["production"], 2.0, 2.0) * 1.25
    error = np.sqrt((own.var(ddof=1) + other.var(ddof=1)) / 3)
    np.testing.assert_allclose(entry["ci95"], -15 + 196 * np.array([-1, 1]) * error, rtol=1e-4)
    paired = by_day.novelty_effect(SHORT_VIDEO, early, late, "production", paired=True)["mmrf"]["watch_time"]["ci95"]
    np.testing.assert_allclose(paired, -15 + 196 * np.array([-1, 1]) * (own - other).std(ddof=1) / 3**0.5, rtol=1e-4)
    for paired in (False, True):
        control = by_day.novelty_effect(SHORT_VIDEO, early, late, "production", paired)["production"]["watch_time"]
        assert control == {"early": 0.0, "late": 0.0, "change": 0.0, "ci95": [0.0, 0.0]}


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_cover_the_true_change(paired):
    rng, tests = np.random.default_rng(0), 1000
    inside = dict.fromkeys(("watch_time", "visits", "watch_time_per_day"), 0)
    for _ in range(tests):
        result = by_day.novelty_effect(SHORT_VIDEO, *parts(rng, 600, (1.3, 1.1), paired), "production", paired)["mmrf"]
        for metric in inside:
            low, high = result[metric]["ci95"]
            inside[metric] += low <= (0.0 if metric == "visits" else -20.0) <= high
    for metric, count in inside.items():
        assert 0.93 <= count / tests <= 0.97, metric


@pytest.mark.parametrize("users", [0, 3, 24])
def test_intervals_that_events_cannot_carry_are_none_with_a_reason(users):
    """Of the half in which fewer users of either arm have any."""
    many = {"watch_time": np.arange(1.0, 101.0), "sessions": np.ones(100)}
    few = many | {"watch_time": many["watch_time"] * (np.arange(100) < users)}
    no_one = few | {"sessions": 1.0 * (np.arange(100) < users)}  # of whom the others did not come
    for scarce, name in ((few, "mmrf"), (no_one, "mmrf"), (few, "production"), (no_one, "production")):
        late = {"production": many, "mmrf": many} | {name: scarce}
        entry = by_day.novelty_effect(SHORT_VIDEO, {"production": many, "mmrf": many}, late, "production", paired=True)[
            "mmrf"
        ]["watch_time"]
        note = f"too few: {users} users of {name} have any, an interval needs 25"
        assert entry == {"early": None, "late": None, "change": None, "ci95": None, "note": note}


def test_table_by_day():
    rng = np.random.default_rng(1)
    days = [
        compare_sums(SHORT_VIDEO, x, "production", paired=True)["ab_test"] for x in parts(rng, 50, (1.0, 2.0), True)
    ]
    rows = [{"day": i, "ab_test": result} for i, result in enumerate(days, 3)]
    lines = by_day.format_days({"ab_test": days[0], "by_day": rows}, "visits").splitlines()
    assert lines[0] == "| day | production, visits | mmrf, visits |" and len(lines) == 4
    assert lines[3].startswith("| 4 | ") and statistics.cell(days[1]["mmrf"]["visits"]) in lines[3]
