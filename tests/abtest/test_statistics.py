"""A/B statistics: hand-computed intervals, coverage of A/A tests, CUPED, catalogue metrics."""

import json

import numpy as np
import pytest
from in_memory import compare_sums

from mmrf_jax.abtest import assignment, moments, statistics
from mmrf_jax.metrics import diversity
from mmrf_jax.signals import SHORT_VIDEO


def _arm(rng: np.random.Generator, users: int, lift: float = 1.0, taste: np.ndarray | None = None):
    """Per-user sums of `users` sessions: heavy-tailed watch time, depth that goes with it, rare likes."""
    taste = rng.normal(0, 0.7, users) if taste is None else taste
    watch = lift * 60 * np.exp(taste + rng.normal(0, 0.5, users))
    depth = 1 + rng.poisson(watch / 15)
    return {
        "watch_time": watch,
        "depth": depth,
        "requests": -(-depth // 6),
        "like": rng.binomial(depth, 0.05 * np.exp(-0.3 * taste).clip(0, 5)),
        "returned": rng.random(users) < 0.4,
    }


def _entry(results, arm, metric):
    return results["ab_test"][arm][metric]


def _compare(control, treated, **options):
    return compare_sums(SHORT_VIDEO, {"production": control, "mmrf": treated}, "production", **options)


@pytest.fixture
def few(monkeypatch):
    """Cases by hand are of a few users."""
    monkeypatch.setattr(statistics, "MIN_EVENTS", 1)
    monkeypatch.setattr(statistics, "MAX_ERROR", 2.0)


def _around(ratio: float, error: float) -> np.ndarray:
    """The interval of a ratio in % of a difference, `error` being the standard error of the ratio."""
    return 100 * (ratio * np.exp(1.959964 * error / ratio * np.array([-1, 1])) - 1)


def test_intervals_by_hand(few):
    control, treated = np.array([1.0, 2.0, 3.0, 6.0]), np.array([2.0, 3.0, 3.0, 10.0])
    independent = _entry(_compare({"watch_time": control}, {"watch_time": treated}, paired=False), "mmrf", "watch_time")
    assert independent["mean"] == 4.5
    assert independent["diff_pct"] == pytest.approx(50.0)
    variance = treated.var(ddof=1) / 4 / 9 + 4.5**2 / 81 * control.var(ddof=1) / 4
    np.testing.assert_allclose(independent["ci95"], _around(1.5, np.sqrt(variance)), rtol=1e-4)
    paired = _entry(_compare({"watch_time": control}, {"watch_time": treated}, paired=True), "mmrf", "watch_time")
    error = (treated / 3 - 1.5 * control / 3).std(ddof=1) / 2  # of the linearised difference of each user
    np.testing.assert_allclose(paired["ci95"], _around(1.5, error), rtol=1e-4)


def test_interaction_rates_are_per_exposed_video_and_sessions_are_counted(few):
    arm = {"like": np.array([1, 0, 3]), "depth": np.array([10, 10, 20]), "watch_time": np.array([5.0, 10.0, 30.0])}
    arm |= {"sessions": np.array([1, 1, 3]), "requests": np.array([2, 2, 5]), "ild": np.array([1.0, 1.5, 2.0])}
    results = _compare(arm, arm, paired=True)
    means = {metric: entry["mean"] for metric, entry in results["ab_test"]["mmrf"].items()}
    expected = {"watch_time": 9.0, "depth": 8.0, "requests": 1.8, "like": 0.1, "ild": 0.5}
    assert means == pytest.approx(expected)
    for entry in results["ab_test"]["mmrf"].values():  # the same arm twice, paired: no doubt at all
        np.testing.assert_allclose([entry["diff_pct"], *entry["ci95"]], 0.0, atol=1e-5)


def test_control_has_zero_and_the_keys_of_the_contract():
    rng = np.random.default_rng(0)
    results = _compare(_arm(rng, 50), _arm(rng, 60), paired=False)
    assert set(results) == {"ab_test", "signals"} and list(results["ab_test"]) == ["production", "mmrf"]
    assert set(results["ab_test"]["mmrf"]) == {"watch_time", "depth", "requests", "like", "return_rate"}
    for entry in results["ab_test"]["production"].values():
        assert entry["diff_pct"] == 0.0 and entry["ci95"] == [0.0, 0.0]
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_delta_intervals_agree_with_a_bootstrap():
    rng = np.random.default_rng(1)
    control, treated = _arm(rng, 3000), _arm(rng, 2000, lift=1.1)
    results = _compare(control, treated, paired=False)
    draws = {"watch_time": [], "like": []}
    for _ in range(800):
        a, c = rng.integers(0, 2000, 2000), rng.integers(0, 3000, 3000)
        draws["watch_time"].append(treated["watch_time"][a].mean() / control["watch_time"][c].mean())
        rate = treated["like"][a].sum() / treated["depth"][a].sum()
        draws["like"].append(rate / (control["like"][c].sum() / control["depth"][c].sum()))
    for metric, ratios in draws.items():
        low, high = _entry(results, "mmrf", metric)["ci95"]
        spread = 100 * 2 * 1.96 * np.std(ratios)
        assert (high - low) / spread == pytest.approx(1.0, abs=0.08), metric


@pytest.mark.parametrize("paired", [False, True])
def test_aa_intervals_cover_zero_as_often_as_they_say(paired):
    rng, tests = np.random.default_rng(7), 1000  # the standard error of a coverage is then 0.7 %
    inside = {"watch_time": 0, "depth": 0, "like": 0, "return_rate": 0}
    for _ in range(tests):
        taste = rng.normal(0, 0.7, 400)
        arms = [_arm(rng, 400, taste=taste if paired else None) for _ in range(2)]
        results = _compare(*arms, paired=paired)
        for metric in inside:
            low, high = _entry(results, "mmrf", metric)["ci95"]
            inside[metric] += low <= 0.0 <= high
    for metric, count in inside.items():
        assert 0.93 <= count / tests <= 0.97, metric


def test_intervals_cover_a_true_difference():
    rng = np.random.default_rng(8)
    inside = 0
    for _ in range(400):
        low, high = _entry(_compare(_arm(rng, 400), _arm(rng, 600, 1.3), paired=False), "mmrf", "watch_time")["ci95"]
        inside += low <= 30.0 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(2)
    taste = rng.normal(0, 0.7, 2000)
    control, treated = _arm(rng, 2000, taste=taste), _arm(rng, 2000, 1.05, taste)
    width = {}
    for paired in (False, True):
        entry = _entry(_compare(control, treated, paired=paired), "mmrf", "watch_time")
        width[paired] = entry["ci95"][1] - entry["ci95"][0]
    assert width[True] < 0.8 * width[False]


def test_cuped_narrows_the_interval_and_keeps_the_mean():
    rng = np.random.default_rng(3)
    estimates, widths = {False: [], True: []}, {False: [], True: []}
    covered = 0
    for _ in range(300):
        tastes = {"production": rng.normal(0, 0.7, 400), "mmrf": rng.normal(0, 0.7, 500)}
        arms = {"production": _arm(rng, 400, 1.0, tastes["production"]), "mmrf": _arm(rng, 500, 1.1, tastes["mmrf"])}
        covariate = {arm: np.exp(taste) for arm, taste in tastes.items()}
        for adjusted in (False, True):
            entry = _entry(
                compare_sums(SHORT_VIDEO, arms, "production", False, covariate if adjusted else None),
                "mmrf",
                "watch_time",
            )
            estimates[adjusted].append(entry["diff_pct"])
            widths[adjusted].append(entry["ci95"][1] - entry["ci95"][0])
        covered += entry["ci95"][0] <= 10.0 <= entry["ci95"][1]
    assert np.mean(widths[True]) < 0.75 * np.mean(widths[False])
    assert np.std(estimates[True]) < 0.75 * np.std(estimates[False])
    assert np.mean(estimates[True]) == pytest.approx(10.0, abs=1.0)
    assert 0.92 <= covered / 300 <= 0.98


def test_cuped_leaves_the_mean_over_all_users_and_ignores_noise():
    rng = np.random.default_rng(4)
    control, treated = _arm(rng, 300), _arm(rng, 300)
    noise = {"production": rng.normal(size=300), "mmrf": rng.normal(size=300)}
    plain, adjusted = (
        _compare(control, treated, paired=False),
        _compare(control, treated, paired=False, covariate=noise),
    )
    for metric in ("watch_time", "depth"):  # arms of equal size: what one gains the other loses
        means = [sum(_entry(r, arm, metric)["mean"] for arm in noise) for r in (plain, adjusted)]
        assert means[0] == pytest.approx(means[1])
    constant = {arm: np.ones(300) for arm in noise}
    same = _entry(_compare(control, treated, paired=False, covariate=constant), "mmrf", "like")
    np.testing.assert_allclose(same["ci95"], _entry(plain, "mmrf", "like")["ci95"])


def test_cuped_with_several_covariates_is_a_regression():
    """Against NumPy: residuals of the linearised metric after a pooled regression within the arms."""
    rng, n = np.random.default_rng(9), {"production": 500, "mmrf": 700}
    arms, covariate = {}, {}
    for arm, users in n.items():
        taste, mood = rng.normal(0, 0.7, (2, users))
        arms[arm] = _arm(rng, users, taste=taste + mood)
        rare = 1e-4 * (rng.random(users) < 0.1)  # of another scale
        covariate[arm] = np.stack([100 * np.exp(taste), mood, rare, np.full(users, 0.25)], axis=1)
    results = compare_sums(SHORT_VIDEO, arms, "production", False, covariate)
    everyone = np.concatenate([covariate[arm] for arm in n]).mean(axis=0)
    for metric, bottom in (("watch_time", None), ("like", "depth")):
        z, value = {}, {}
        for arm in n:
            low = np.ones(n[arm]) if bottom is None else arms[arm][bottom]
            value[arm] = arms[arm][metric].sum() / low.sum()
            z[arm] = (arms[arm][metric] - value[arm] * low) / low.mean()
        x = np.concatenate([covariate[arm][:, :3] - covariate[arm][:, :3].mean(axis=0) for arm in n])
        theta = np.linalg.lstsq(x, np.concatenate([z[arm] for arm in n]), rcond=None)[0]
        for arm in n:
            value[arm] -= theta @ (covariate[arm].mean(axis=0) - everyone)[:3]
            z[arm] = z[arm] - covariate[arm][:, :3] @ theta
        entry = _entry(results, "mmrf", metric)
        ratio = value["mmrf"] / value["production"]
        assert entry["mean"] == pytest.approx(value["mmrf"])
        assert entry["diff_pct"] == pytest.approx(100 * (ratio - 1))
        error = (
            np.hypot(z["mmrf"].std() / np.sqrt(n["mmrf"]), ratio * z["production"].std() / np.sqrt(n["production"]))
            / value["production"]
        )
        # Means over everyone move with both arms, a term of the order of the adjustment itself.
        assert (entry["ci95"][1] - entry["ci95"][0]) / 2 == pytest.approx(196 * error, rel=0.02)


def test_a_second_interval_that_may_be_looked_at_often():
    rng = np.random.default_rng(10)
    arms = {arm: _arm(rng, 400) | {"exposures": np.ones((2, 5), int)} for arm in ("production", "mmrf")}
    test = statistics.ABTest(SHORT_VIDEO, tuple(arms), "production", paired=False)
    assert test.users() == {}
    test.update(arms)
    assert test.users() == {"production": 400, "mmrf": 400}
    entry, plain = test.results(3.0)["ab_test"]["mmrf"], test.results()["ab_test"]["mmrf"]
    ratio = 1 + entry["like"]["diff_pct"] / 100
    wide, narrow = (np.log((1 + np.array(entry["like"][name]) / 100) / ratio) for name in ("always_valid95", "ci95"))
    np.testing.assert_allclose(wide, 3.0 / statistics.Z95 * narrow)
    assert {name: x["ci95"] for name, x in entry.items()} == {name: x["ci95"] for name, x in plain.items()}
    assert "always_valid95" not in entry["coverage"] and "always_valid95" not in plain["like"]


def test_users_who_do_not_come_count_by_user_and_day():
    arm = {"sessions": np.array([2, 0, 1]), "watch_time": np.array([30.0, 0.0, 60.0]), "user_days": np.full(3, 4)}
    metrics = _compare(arm, arm, paired=True)["ab_test"]["mmrf"]
    means = {name: entry["mean"] for name, entry in metrics.items()}
    assert means == pytest.approx({"watch_time": 30.0, "visits": 3 / 12, "watch_time_per_day": 90 / 12})


@pytest.mark.parametrize("paired", [False, True])
def test_order_and_blocks_of_users_do_not_matter(paired, monkeypatch):
    rng = np.random.default_rng(5)
    arms = {"production": _arm(rng, 500), "mmrf": _arm(rng, 500), "ltr": _arm(rng, 500)}
    expected = compare_sums(SHORT_VIDEO, arms, "production", paired)["ab_test"]
    order = rng.permutation(500)
    test = statistics.ABTest(SHORT_VIDEO, tuple(arms), "production", paired)
    monkeypatch.setattr(moments, "BLOCK_ROWS", 64)
    for rows in np.array_split(order, 3):
        test.update({arm: {key: value[rows] for key, value in sums.items()} for arm, sums in arms.items()})
    for arm, metrics in test.results()["ab_test"].items():
        for metric, entry in metrics.items():
            np.testing.assert_allclose(entry["ci95"], expected[arm][metric]["ci95"], rtol=1e-9, atol=1e-9)


def _liked(users: int, likes: int, each: int = 1) -> dict[str, np.ndarray]:
    """Sums of users of whom so many have `each` likes."""
    return {
        "like": each * (np.arange(users) < likes),
        "depth": np.full(users, 10.0),
        "watch_time": np.full(users, 60.0),
    }


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(
    ("control", "treated", "scarce"),
    [
        (24, 200, "24 users of production"),
        (200, 24, "24 users of mmrf"),
        (0, 0, "0 users of production"),
        (200, 0, "0 users of mmrf"),
        (25, 25, None),
        (25, 200, None),
    ],
)
def test_intervals_that_events_cannot_carry_are_none_with_a_reason(control, treated, scarce, paired):
    results = _compare(_liked(400, control), _liked(400, treated), paired=paired)
    entry, text = _entry(results, "mmrf", "like"), statistics.format_ab_test(results)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    if scarce is None:
        low, high = entry["ci95"]
        assert -100 < low <= entry["diff_pct"] <= high and "note" not in entry and "too few" not in text
    else:
        assert (entry["diff_pct"], entry["ci95"]) == (None, None) and entry["mean"] == treated / 4000
        assert entry["note"] == f"too few: {scarce} have any, an interval needs 25"
        assert ", too few " in text.splitlines()[-1]
    assert _entry(results, "production", "like")["ci95"] == [0.0, 0.0]


def test_intervals_that_events_cannot_carry_count_users_and_not_what_one_of_them_does():
    entry = _entry(_compare(_liked(400, 10, each=30), _liked(400, 10, each=40), paired=False), "mmrf", "like")
    assert entry["ci95"] is None and "10 users of production" in entry["note"]
    one = _liked(400, 30)
    one["like"][0] = 10_000  # nearly all likes are of one user
    entry = _entry(_compare(one, _liked(400, 30), paired=False), "mmrf", "like")
    assert entry["ci95"] is None and entry["note"].startswith("too wide: ")
    exposed = {"exposures": np.ones((20, 50), int)}
    tiny = _compare(_liked(24, 24) | exposed, _liked(24, 24) | exposed, paired=False)["ab_test"]["mmrf"]
    assert {metric: entry["ci95"] for metric, entry in tiny.items()} == dict.fromkeys(tiny)


def test_intervals_of_few_events_hold_the_truth_and_stay_above_minus_100():
    """Likes of 35 of 300 users in one arm and of 80 in the others: with 1,500 tests chance moves a coverage by .006."""
    rng, inside, low = np.random.default_rng(11), {"one": [], "third": []}, 0.0
    for _ in range(1_500):
        counts = {name: rng.poisson(rate, 300) for name, rate in (("base", 0.36), ("one", 0.36), ("third", 0.12))}
        arms = {name: {"like": x, "depth": np.full(300, 10)} for name, x in counts.items()}
        results = compare_sums(SHORT_VIDEO, arms, "base", paired=False)["ab_test"]
        for name, truth in (("one", 0.0), ("third", -200 / 3)):
            if bounds := results[name]["like"]["ci95"]:
                inside[name].append(bounds[0] <= truth <= bounds[1])
                low = min(low, bounds[0])
    assert all(len(x) > 1_400 and 0.93 <= np.mean(x) <= 0.97 for x in inside.values()), inside
    assert -100 < low < -75


def test_intervals_of_many_events_are_those_around_the_difference():
    """The delta method's and Fieller's, by hand, for 200,000 users an arm."""
    rng = np.random.default_rng(12)
    a, b = rng.poisson(1.0, 200_000), rng.poisson(1.1, 200_000)
    low, high = _entry(_compare({"depth": a}, {"depth": b}, paired=False), "mmrf", "depth")["ci95"]
    x, y, vx, vy = a.mean(), b.mean(), a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    ratio, g = y / x, statistics.Z95**2 * vx / x**2
    delta = statistics.Z95 * np.sqrt(vy + ratio**2 * vx) / x
    np.testing.assert_allclose([low, high], 100 * (ratio - 1 + delta * np.array([-1, 1])), atol=0.01)
    half = statistics.Z95 / x * np.sqrt(vy * (1 - g) + ratio**2 * vx)
    np.testing.assert_allclose([low, high], 100 * ((ratio + half * np.array([-1, 1])) / (1 - g) - 1), atol=0.01)


def test_a_run_too_small_to_tell_says_so_in_one_sentence():
    rng = np.random.default_rng(13)
    arms = {"production": _arm(rng, 64), "again": _arm(rng, 64), "twice": _arm(rng, 64, 2.5)}
    said = statistics.too_small(compare_sums(SHORT_VIDEO, arms, "production", paired=False))
    assert said.startswith(
        "Too small to tell again from production by watch_time: the true difference may be 0, and as"
    )
    few = statistics.too_small(_compare(_arm(rng, 20), _arm(rng, 20, 9.0), paired=False))
    assert few.endswith("there are too few users for an interval; use more sessions.")
    assert all(text.count(". ") == 0 and "\n" not in text for text in (said, few))
    sure = compare_sums(SHORT_VIDEO, {name: arms[name] for name in ("production", "twice")}, "production", paired=False)
    same = compare_sums(SHORT_VIDEO, {"production": arms["again"], "again": arms["again"]}, "production", paired=True)
    assert statistics.too_small(sure) == statistics.too_small(same) == ""


def test_bold_is_better_or_worse_by_metric():
    assert [statistics.verdict(bounds) for bounds in ([1, 2], [-2, -1], [-1, 1], [0, 0], None)] == [
        "better",
        "worse",
        "",
        "",
        "",
    ]
    assert statistics.lower_is_better(SHORT_VIDEO) == {"hate", "truncated", "gini"}
    assert statistics.verdict([1, 2], less=True) == "worse"
    noise = np.arange(100) % 2
    control, treated = ({"hate": rate + noise, "like": rate + noise, "depth": np.full(100, 50)} for rate in (1, 3))
    row = statistics.format_ab_test(_compare(control, treated, paired=False), ["like", "hate"]).splitlines()[-1]
    assert row.split("|")[2].strip().endswith("] better") and row.split("|")[3].strip().endswith("] worse")
    row = statistics.format_ab_test(_compare(control, control, paired=False), ["like", "hate"]).splitlines()[-1]
    assert "better" not in row and "worse" not in row


def test_empty_groups_add_nothing_and_an_arm_below_two_users_is_named():
    rng = np.random.default_rng(14)
    control, treated = _arm(rng, 300), _arm(rng, 200)
    no_one = {name: values[:0] for name, values in treated.items()}
    expected = _compare(control, treated, paired=False)
    test = statistics.ABTest(SHORT_VIDEO, ("production", "mmrf"), "production", paired=False)
    test.update({"production": control, "mmrf": no_one})
    with pytest.raises(ValueError, match="arm 'mmrf' has 0 users, intervals need at least 2; use more sessions"):
        test.results()
    test.update({"production": {name: x[:0] for name, x in control.items()}, "mmrf": treated})
    test.update({"production": {name: x[:0] for name, x in control.items()}, "mmrf": no_one})
    assert test.results()["ab_test"] == expected["ab_test"] and test.users() == {"production": 300, "mmrf": 200}


def test_empty_groups_of_sessions_have_no_mean():
    """No one of an arm came on a day: what is by session has no mean there, what is by user is 0."""
    came = {"sessions": np.ones(50), "watch_time": np.arange(50.0), "depth": np.arange(50.0), "user_days": np.ones(50)}
    no_one = came | {name: np.zeros(50) for name in ("sessions", "watch_time", "depth")}
    for control, treated in ((came, no_one), (no_one, came), (no_one, no_one)):
        for covariate in (None, {"production": np.arange(50.0), "mmrf": np.arange(50.0)}):
            results = _compare(control, treated, paired=False, covariate=covariate)
            assert json.loads(json.dumps(results, allow_nan=False)) == results and statistics.format_ab_test(results)
            entry = _entry(results, "mmrf", "watch_time")
            assert entry["ci95"] is None and entry["note"] and (entry["mean"] is None) == (treated is no_one)
            assert _entry(results, "mmrf", "visits")["ci95"] is None


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e9])
def test_empty_groups_of_a_covariate_that_is_constant_change_nothing(value):
    rng = np.random.default_rng(15)
    control, treated = _arm(rng, 300), _arm(rng, 300)
    constant = {arm: np.full(300, value) for arm in ("production", "mmrf")}
    plain, same = (_compare(control, treated, paired=False, covariate=x) for x in (None, constant))
    for metric, entry in plain["ab_test"]["mmrf"].items():
        np.testing.assert_allclose(_entry(same, "mmrf", metric)["ci95"], entry["ci95"], rtol=1e-6)


def _exposed(rng, users: int, videos: int, skew: float):
    """Exposures [G, V] of users who see 20 Zipf-popular videos each."""
    share = 1.0 / np.arange(1, videos + 1) ** skew
    seen = rng.choice(videos, (users, 20), p=share / share.sum())
    groups = np.repeat(assignment.assign(np.arange(users), [0.05] * 20, "groups"), 20)
    counts = np.zeros((20, videos), np.int64)
    np.add.at(counts, (groups, seen.reshape(-1)), 1)
    return counts


def test_catalogue_metrics_have_jackknife_intervals():
    rng = np.random.default_rng(6)
    inside = {"coverage": 0, "gini": 0}
    sums = {"depth": np.full(400, 20)}
    for _ in range(150):
        arms = [sums | {"exposures": _exposed(rng, 400, 1000, 0.8)} for _ in range(2)]
        results = _compare(*arms, paired=False)
        for metric in inside:
            low, high = _entry(results, "mmrf", metric)["ci95"]
            inside[metric] += low <= 0.0 <= high
    # A jackknife errs on the wide side: of 1000 such A/A tests, Gini covers 97 % and coverage all.
    assert min(inside.values()) / 150 >= 0.93, inside
    flatter = sums | {"exposures": _exposed(rng, 400, 1000, 0.4)}
    results = _compare(arms[0], flatter, paired=True)
    assert _entry(results, "mmrf", "coverage")["ci95"][0] > 0 > _entry(results, "mmrf", "gini")["ci95"][1]
    assert _entry(results, "mmrf", "gini")["mean"] == diversity.gini(flatter["exposures"].sum(0))
    assert _entry(results, "production", "gini")["ci95"] == [0.0, 0.0]


def test_table_is_aligned_and_wraps():
    rng = np.random.default_rng(0)
    results = _compare(_arm(rng, 100), _arm(rng, 100), paired=False)
    table = statistics.format_ab_test(results, ["watch_time", "like"])
    lines = table.splitlines()
    assert len(lines) == 4 and len(set(map(len, lines))) == 1
    assert set(lines[1]) == {"|", "-"} and [line.count("|") for line in lines] == [4] * 4
    assert "%" not in lines[2] and lines[2].startswith("| production ")  # the control, without differences to itself
    assert " % [" in lines[3] and ", too few" in lines[3] and lines[3].startswith("| mmrf ")
    wrapped = statistics.format_ab_test(results["ab_test"], width=80)
    assert max(map(len, wrapped.splitlines())) <= 80 and wrapped.count("| mmrf ") > 1
    with pytest.raises(KeyError, match="gini"):
        statistics.format_ab_test(results, ["gini"])


def test_errors_name_the_thing():
    arm, two = {"depth": np.ones(3)}, {"depth": np.ones(2)}
    with pytest.raises(ValueError, match="control 'ltr' must be one of the arms"):
        compare_sums(SHORT_VIDEO, {"mmrf": arm}, "ltr", True)
    with pytest.raises(ValueError, match="'mmrf' has 2, 'production' 3; use paired=False"):
        _compare(arm, two, paired=True)
    with pytest.raises(ValueError, match="same users in the same order"):
        _compare(arm | {"user_id": np.arange(3)}, arm | {"user_id": np.arange(3)[::-1]}, paired=True)
    with pytest.raises(ValueError, match="choose among sessions, watch_time"):
        _compare(arm, {"lik": np.ones(3)}, paired=True)
    with pytest.raises(ValueError, match="depth of arm 'mmrf' has 1 numbers that are not finite"):
        _compare(arm, {"depth": np.array([1, np.nan, 1])}, paired=True)
    with pytest.raises(ValueError, match="nothing to adjust"):
        _compare(arm, arm, paired=True, covariate={"production": np.ones(3), "mmrf": np.ones(3)})
    with pytest.raises(ValueError, match="at least 2"):
        _compare({"depth": np.ones(1)}, {"depth": np.ones(1)}, paired=False)


def test_ten_thousand_million_requests_do_not_overflow():
    """Blocks as the device gives them, with counts of 32 bits that are nearly full."""
    number, groups, videos = 1_000, 20, 3
    test, rng = (
        statistics.ABTest(SHORT_VIDEO, ("production", "mmrf"), "production", paired=True),
        np.random.default_rng(0),
    )
    requests, watch = rng.integers(1, 2**21, (6, number)), rng.uniform(0.0, 1e8, (6, number))
    counts = np.full((groups, videos), 2**31 - 1, np.int32)
    counts[:, 2] = 1
    for block in range(6):
        arm = {
            "requests": requests[block],
            "watch_time": watch[block],
            "depth": 6 * requests[block],
            "exposures": counts,
        }
        test.update({"production": arm, "mmrf": arm})
    assert requests.sum() > 6e9 and counts.sum(dtype=np.int64) * 6 > 4e11
    found = test.results()["ab_test"]["mmrf"]
    assert found["requests"]["mean"] == pytest.approx(requests.mean(dtype=np.float64), rel=1e-12)
    assert found["watch_time"]["mean"] == pytest.approx(watch.mean(), rel=1e-12)
    assert found["coverage"]["mean"] == 1.0
    total = 6.0 * groups * np.array([2**31 - 1, 2**31 - 1, 1])
    assert found["gini"]["mean"] == pytest.approx(diversity.gini(total), rel=1e-12)


def test_counts_of_ten_billion_requests_do_not_overflow():
    """Blocks whose exposures fill int32, as devices count them: their sum is as exact as that of small ones."""
    most = 2**31 - 1
    small = {"watch_time": np.array([3.0, 5.0]), "requests": np.array([1.0, 3.0]), "sessions": np.array([1.0, 1.0])}
    shares = np.array([[0, 1, 1, 0], [2, 1, 0, 0]])
    results = []
    for unit, blocks in ((1, 1), (most // 2, 6)):
        test = statistics.ABTest(SHORT_VIDEO, ["production", "mmrf"], "production", paired=True)
        for _ in range(blocks):
            big = {name: value * unit for name, value in small.items()} | {
                "exposures": (shares * unit).astype(np.int32)
            }
            test.update({"production": big, "mmrf": big})
        results.append(test.results()["ab_test"]["mmrf"])
    assert 6 * 5 * (most // 2) > 10**10
    assert {name: entry["mean"] for name, entry in results[1].items()} == pytest.approx(
        {name: entry["mean"] for name, entry in results[0].items()}, rel=1e-12
    )
    total = moments.Moments(1)
    for _ in range(3):  # sums of a user and metric of which a user-request is the smallest step
        total.update(np.array([[1e10], [1e10 + 1]]))
    assert total.mean[0] * total.count == 6e10 + 3
