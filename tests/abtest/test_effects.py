"""Effects on any metrics against SciPy and formulas by hand; tables of any kind; what is undefined; nonsense."""

import math
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from scipy import stats

import mmrf_jax as mmrf
from mmrf_jax.abtest import compare, sample_ratio_mismatch, sequential

TIGHT = {"rel": 1e-10, "abs": 1e-14}


@pytest.fixture(scope="module")
def arms():
    """Two arms of users: watch time, depth, likes, and the watch time of last week; strings that no metric needs."""
    rng, made = np.random.default_rng(0), {}
    for arm, n, gain in (("control", 400, 0.0), ("treatment", 330, 0.15)):
        before = rng.gamma(2.0, 10.0, n)
        depth = rng.poisson(6.0, n) + 1
        made[arm] = {
            "watch_time": before * rng.lognormal(gain, 0.3, n),
            "depth": depth,
            "likes": rng.binomial(depth, 0.2 + 0.1 * gain),
            "before": before,
            "user": np.array([f"{arm} {i}" for i in range(n)]),
        }
    return made


def columns(arms, *names):
    return {arm: {name: table[name] for name in names} for arm, table in arms.items()}


def welch(mine, base, alpha=0.05):
    test = stats.ttest_ind(mine, base, equal_var=False)
    return test.pvalue, *test.confidence_interval(1 - alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1e-4])
def test_tests_and_intervals_are_scipys(arms, alpha):
    mine, base = arms["treatment"]["watch_time"], arms["control"]["watch_time"]
    found = compare(columns(arms, "watch_time"), "control", alpha=alpha)["treatment"]["watch_time"]
    p_value, low, high = welch(mine, base, alpha)
    assert (found.p_value, found.low, found.high) == pytest.approx((p_value, low, high), rel=1e-12)
    assert (found.value, found.diff) == pytest.approx((mine.mean(), mine.mean() - base.mean()), rel=1e-12)
    both = {"a": {"x": base}, "b": {"x": base + np.random.default_rng(4).normal(0.2, 2.0, 400)}}
    paired = compare(both, "a", paired=True, alpha=alpha)["b"]["x"]
    test = stats.ttest_rel(both["b"]["x"], base)
    wanted = (test.pvalue, *test.confidence_interval(1 - alpha))
    assert (paired.p_value, paired.low, paired.high) == pytest.approx(wanted, rel=1e-11)
    counts = {"a": 5200, "b": 4800, "c": 9000}
    wanted = stats.chisquare([5200, 4800, 9000], [4750, 4750, 9500]).pvalue
    assert sample_ratio_mismatch(counts, {"a": 0.5, "b": 0.5, "c": 1.0}) == pytest.approx(wanted, rel=1e-12)


def test_a_ratio_is_tested_by_the_delta_method(arms):
    """Variance of Σ x / Σ y from the variances and the covariance of the means (Deng, Knoblich and Lu, 2018)."""
    found = compare(arms, "control", metrics={"like_rate": ("likes", "depth")}, alpha=0.1)["treatment"]["like_rate"]
    ratios, errors, counts = [], [], []
    for table in (arms["treatment"], arms["control"]):
        x, y, n = table["likes"], table["depth"], len(table["likes"])
        ratio, cov = x.mean() / y.mean(), np.cov(x, y)
        ratios.append(ratio)
        errors.append((cov[0, 0] - 2 * ratio * cov[0, 1] + ratio**2 * cov[1, 1]) / y.mean() ** 2 / n)
        counts.append(n)
    freedom = sum(errors) ** 2 / sum(e**2 / (n - 1) for e, n in zip(errors, counts, strict=True))
    diff, error = ratios[0] - ratios[1], math.sqrt(sum(errors))
    assert found.value == pytest.approx(ratios[0], **TIGHT) and found.diff == pytest.approx(diff, **TIGHT)
    quantile = stats.t.ppf(0.95, freedom)
    assert (found.low, found.high) == pytest.approx((diff - quantile * error, diff + quantile * error), **TIGHT)
    assert found.p_value == pytest.approx(2 * stats.t.sf(abs(diff) / error, freedom), **TIGHT)
    ones = {arm: table | {"one": np.ones(len(table["likes"]))} for arm, table in arms.items()}
    plain = compare(ones, "control", metrics={"a": "likes", "b": ("likes", "one")})["treatment"]
    assert (plain["b"].low, plain["b"].p_value) == pytest.approx((plain["a"].low, plain["a"].p_value), **TIGHT)


def test_paired_ratios_use_the_covariance_of_the_arms(arms):
    rng = np.random.default_rng(1)
    base = columns({"a": arms["control"]}, "likes", "depth")["a"]
    other = {"likes": base["likes"] + rng.binomial(1, 0.2, 400), "depth": base["depth"] + rng.binomial(1, 0.3, 400)}
    found = compare({"a": base, "b": other}, "a", paired=True, metrics={"rate": ("likes", "depth")})["b"]["rate"]
    four = np.stack([other["likes"], other["depth"], base["likes"], base["depth"]])
    x, y, u, v = four.mean(axis=1)
    gradient = np.array([1 / y, -x / y**2, -1 / v, u / v**2])
    error = math.sqrt(gradient @ np.cov(four) @ gradient / 400)
    assert found.diff == pytest.approx(x / y - u / v, **TIGHT)
    assert (found.high - found.low) / 2 == pytest.approx(stats.t.ppf(0.975, 399) * error, **TIGHT)
    alone = compare({"a": base, "b": other}, "a", metrics={"rate": ("likes", "depth")})["b"]["rate"]
    assert found.high - found.low < 0.5 * (alone.high - alone.low)


def test_cuped_by_hand(arms):
    found = compare(arms, "control", covariate="before", metrics=["watch_time"])["treatment"]["watch_time"]
    x = {arm: table["before"] for arm, table in arms.items()}
    y = {arm: table["watch_time"] for arm, table in arms.items()}
    cov = sum(np.cov(x[arm], y[arm])[0, 1] * (len(x[arm]) - 1) for arm in x)
    theta = cov / sum(np.var(x[arm], ddof=1) * (len(x[arm]) - 1) for arm in x)
    adjusted = {arm: y[arm] - theta * (x[arm] - np.concatenate([*x.values()]).mean()) for arm in x}
    p_value, low, high = welch(adjusted["treatment"], adjusted["control"])
    assert (found.low, found.high, found.p_value) == pytest.approx((low, high, p_value), **TIGHT)
    plain = compare(columns(arms, "watch_time"), "control")["treatment"]["watch_time"]
    assert found.high - found.low < 0.8 * (plain.high - plain.low)
    # Regression of the metric on the arm and the covariate gives the same effect (ANCOVA with a common slope).
    design = [np.ones(730), np.repeat([0, 1], [400, 330]), np.concatenate([*x.values()])]
    slope = np.linalg.lstsq(np.stack(design, 1), np.concatenate([*y.values()]), rcond=None)[0][1]
    assert found.diff == pytest.approx(slope, rel=1e-10)


def test_metrics_by_functions_columns_and_ratios(arms):
    metrics = {
        "long": lambda table: table["watch_time"] > 20,
        "log": lambda table: np.log1p(table["watch_time"]),
        7: "likes",
        ("a", "tuple"): (lambda table: table["watch_time"] / 60, "depth"),
    }
    found = compare(arms, "control", metrics=metrics)["treatment"]
    assert list(found) == list(metrics)
    mine, base = arms["treatment"], arms["control"]
    wanted = welch(mine["watch_time"] > 20, (base["watch_time"] > 20) * 1.0)
    assert (found["long"].p_value, found["long"].low, found["long"].high) == pytest.approx(wanted, **TIGHT)
    wanted = welch(np.log1p(mine["watch_time"]), np.log1p(base["watch_time"]))
    assert (found["log"].p_value, found["log"].low, found["log"].high) == pytest.approx(wanted, **TIGHT)
    assert found["a", "tuple"].value == pytest.approx(mine["watch_time"].sum() / 60 / mine["depth"].sum())
    assert compare(arms, "control", metrics=["likes"])["treatment"]["likes"] == found[7]


@pytest.mark.parametrize("kind", ["lists", "pandas", "polars", "pyarrow", "bare"])
def test_tables_of_any_kind_give_the_same(arms, kind):
    wanted = compare(columns(arms, "watch_time", "likes"), "control")["treatment"]
    make = {"lists": lambda x: {k: list(v) for k, v in x.items()}, "pandas": pd.DataFrame, "polars": pl.DataFrame}
    make |= {"pyarrow": lambda x: pa.table(dict(x)), "bare": lambda x: list(x["likes"])}
    given = {arm: make[kind](x) for arm, x in columns(arms, "watch_time", "likes").items()}
    found = compare(given, "control")["treatment"]
    assert found == ({"value": wanted["likes"]} if kind == "bare" else wanted)
    if kind in ("pandas", "polars", "pyarrow"):
        tables = {arm: make[kind](table) for arm, table in arms.items()}  # with a column of strings
        rate = {"rate": ("likes", "depth")}
        assert compare(tables, "control", metrics=rate) == compare(arms, "control", metrics=rate)


def test_always_valid_intervals_are_the_confidence_sequence(arms):
    found = compare(arms, "control", metrics=["likes"], always_valid=True, planned_users=2000)["treatment"]["likes"]
    plain = compare(arms, "control", metrics=["likes"])["treatment"]["likes"]
    mine, base = arms["treatment"]["likes"], arms["control"]["likes"]
    error = math.sqrt(mine.var(ddof=1) / 330 + base.var(ddof=1) / 400)
    half = sequential.quantile(730 / 2000) * error
    assert (found.low, found.high) == pytest.approx((found.diff - half, found.diff + half), **TIGHT)
    assert found.high - found.low > 1.4 * (plain.high - plain.low) and found.p_value > plain.p_value
    itself = compare({"a": [0.0, 1.0] * 50, "b": [1.0, 0.0] * 50}, "a", always_valid=True)["b"]["value"]
    assert itself.p_value == 1.0


@pytest.mark.parametrize("options", [{}, {"alpha": 0.3}, {"paired": True}, {"always_valid": True}, {"covariate": "x"}])
def test_an_interval_excludes_zero_exactly_where_p_is_below_alpha(options):
    rng, decided = np.random.default_rng(2), set()
    for gain in np.linspace(0.0, 1.2, 40):
        given = {arm: {"y": rng.normal(gain * (arm == "b"), 1.0, 60), "x": rng.normal(size=60)} for arm in "ab"}
        effect = compare(given, "a", planned_users=120, **options)["b"]["y"]
        assert (effect.low > 0 or effect.high < 0) == (effect.p_value < options.get("alpha", 0.05))
        decided.add(effect.p_value < options.get("alpha", 0.05))
    assert decided == {False, True}


def test_looking_often_is_only_right_with_always_valid_intervals():
    """A/A tests of a ratio with CUPED, looked at 15 times as users come; p-values below 5 % at any look."""
    rng, wrong = np.random.default_rng(5), {False: 0, True: 0}
    options = {"metrics": {"r": ("y", "n")}, "covariate": "x", "planned_users": 3000}
    for _ in range(80):
        x, n = rng.lognormal(0, 0.5, (2, 1500)), rng.poisson(4, (2, 1500)) + 1
        y = n * x * rng.lognormal(0, 0.5, (2, 1500))
        seen = {False: False, True: False}
        for users in range(100, 1501, 100):
            given = {arm: {"y": y[i, :users], "n": n[i, :users], "x": x[i, :users]} for i, arm in enumerate("ab")}
            for always in seen:
                seen[always] |= compare(given, "a", always_valid=always, **options)["b"]["r"].p_value < 0.05
        for always, found in seen.items():
            wrong[always] += found
    assert wrong[True] <= 6 and wrong[False] >= 12


@pytest.mark.parametrize("options", [{}, {"covariate": "x"}, {"paired": True}])
def test_p_values_of_no_effect_are_uniform(options):
    rng, found = np.random.default_rng(6), []
    for _ in range(400):
        arms = {}
        for arm in "ab":
            x, n = rng.lognormal(0, 0.5, 200), rng.poisson(4, 200) + 1
            arms[arm] = {"y": n * x * rng.lognormal(0, 0.5, 200), "n": n, "x": x}
        found.append(compare(arms, "a", metrics={"r": ("y", "n")}, **options)["b"]["r"].p_value)
    assert stats.kstest(found, "uniform").pvalue > 0.01 and 0.02 < np.mean(np.array(found) < 0.05) < 0.08


def test_holm_by_hand():
    rng = np.random.default_rng(3)
    gains = {"a": (0, 0, 0), "b": (0.4, 0.2, 0.0), "c": (0.6, 0.0, 0.0)}
    given = {arm: {f"m{i}": rng.normal(g, 1.0, 100) for i, g in enumerate(gain)} for arm, gain in gains.items()}
    for table in given.values():
        table["rare"] = np.arange(100) < 3  # no p-value: not of the family
    plain, adjusted = compare(given, "a"), compare(given, "a", holm=True)
    raw = {(arm, m): plain[arm][m].p_value for arm in "bc" for m in ("m0", "m1", "m2")}
    order, least = sorted(raw, key=raw.get), 0.0
    for rank, (arm, metric) in enumerate(order):
        least = max(least, min(1.0, (6 - rank) * raw[arm, metric]))
        assert adjusted[arm][metric].p_value == pytest.approx(least, rel=1e-14)
        assert adjusted[arm][metric].low == plain[arm][metric].low
    assert adjusted["a"]["m0"].p_value == 1.0 and math.isnan(adjusted["b"]["rare"].p_value)


MANY = [0.0, 1.0] * 20
UNDEFINED = {
    "no users in an arm": ({"a": MANY, "b": []}, {}, "no users in b"),
    "no users in the control": ({"a": [], "b": MANY}, {}, "no users in a"),
    "no users at all": ({"a": [], "b": []}, {"paired": True}, "no users in b"),
    "one user": ({"a": MANY, "b": [1.0]}, {}, "no interval: 1 users of b have any, it needs 25"),
    "24 events": ({"a": MANY * 2, "b": [1] * 24 + [0] * 99}, {}, "no interval: 24 users of b have any, it needs 25"),
    "no events": ({"a": [0.0] * 40, "b": [0] * 40}, {}, "no interval: 0 users of a have any"),
    "all alike": ({"a": [0.1] * 40, "b": [0.3] * 40}, {}, "all users are alike"),
    "the same users": ({"a": MANY * 2, "b": MANY * 2}, {"paired": True}, "all users are alike"),
    "alike up to rounding": (
        {arm: {"x": np.arange(1.0, 41.0), "y": 0.1 * np.arange(1.0, 41.0)} for arm in "ab"},
        {"metrics": {"r": ("y", "x")}},
        "all users are alike",
    ),
    "explained by the covariate": (
        {arm: {"y": 3.0 * np.arange(40) + 1.0, "x": np.arange(40)} for arm in "ab"},
        {"covariate": "x"},
        "all users are alike",
    ),
    "denominator of 0": (
        {"a": {"y": MANY, "x": MANY}, "b": {"y": MANY, "x": [0] * 40}},
        {"metrics": {"r": ("y", "x")}},
        "the denominator of b is 0",
    ),
    "too large": ({"a": [1e308] * 40, "b": MANY}, {}, "the numbers of a are too large"),
    "spread too large": ({"a": [1e200, 0] * 40, "b": [1e200, 0] * 40}, {}, "too large or too small"),
}


@pytest.mark.parametrize(("given", "options", "note"), UNDEFINED.values(), ids=UNDEFINED)
def test_what_is_undefined_is_nan_with_a_reason(given, options, note):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        effect = next(iter(compare(given, "a", **options)["b"].values()))
    assert note in effect.note and math.isnan(effect.low) and math.isnan(effect.high) and math.isnan(effect.p_value)
    assert "\n" not in str(effect) and effect.note in str(effect)


def test_a_constant_covariate_adjusts_nothing_and_says_so(arms):
    plain = compare(columns(arms, "likes"), "control")["treatment"]["likes"]
    given = {arm: {"likes": table["likes"], "x": [0.1] * len(table["likes"])} for arm, table in arms.items()}
    effect = compare(given, "control", covariate="x")["treatment"]["likes"]
    assert (effect.low, effect.p_value) == (plain.low, plain.p_value)
    assert effect.note == "the covariate 'x' is constant and adjusts nothing"
    zero = compare({"a": [-1.0, 1.0] * 20, "b": [1.0, 0.0] * 30}, "a")["b"]["value"]
    assert math.isnan(zero.diff_pct) and zero.p_value < 0.05 and zero.note == "no per cent: the value of a is 0"


def test_a_single_arm_has_its_means():
    found = compare({"a": {"x": MANY}}, "a")
    assert found["a"]["x"].value == 0.5 and (found["a"]["x"].diff, found["a"]["x"].p_value) == (0.0, 1.0)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.float32, object, "Int64", "int64[pyarrow]"])
def test_numbers_of_any_type_give_the_same(dtype):
    """Sums beyond the type's range, and differences below 0 of types without a sign."""
    base, mine = np.arange(1000) % 3 == 0, np.arange(1000) % 2 == 0
    wanted = compare({"a": base * 1.0, "b": mine * 1.0}, "a")
    given = {arm: pd.Series(x).astype(dtype) for arm, x in (("a", base), ("b", mine))}
    assert compare(given, "a") == wanted
    big = compare({"a": [2**70 * int(x) for x in base], "b": [2**70 * int(x) for x in mine]}, "a")["b"]["value"]
    assert big.p_value == pytest.approx(wanted["b"]["value"].p_value, rel=1e-9)


NONSENSE = {
    "arms": (([1, 2], "a"), {}, "arms is of type list; give a table for each arm"),
    "data frame": ((pd.DataFrame({"a": MANY, "b": MANY}), "a"), {}, "arms is of type DataFrame"),
    "no arms": (({}, "a"), {}, "control='a' is no arm; choose among none at all"),
    "no columns": (({"a": {}}, "a"), {}, "arm 'a' has no columns"),
    "columns": (({"a": {"x": MANY}, "b": {"y": MANY}}, "a"), {}, r"arm 'b' has columns \['y'\], the control \['x'\]"),
    "nan": (({"a": {"x": [1.0, math.nan]}}, "a"), {}, "x of arm 'a' has 1 numbers that are not finite, .* row 1"),
    "inf": (({"a": {"x": [1.0, math.inf]}}, "a"), {}, "x of arm 'a' has 1 numbers that are not finite, first inf"),
    "none": (({"a": {"x": [1.0, None]}}, "a"), {}, "x of arm 'a' has a row that is no number .*leave it out"),
    "strings": (({"a": {"x": ["1", "2"]}}, "a"), {}, "x of arm 'a' is of <U1, such as .'1'.; give numbers"),
    "lengths": (({"a": {"x": MANY, "y": [1]}}, "a"), {}, "one number for each user"),
    "2-d": (({"a": np.ones((3, 2))}, "a"), {}, r"value of arm 'a' has shape \(3, 2\); give one number for each row"),
    "scalar": (({"a": 3.0}, "a"), {}, r"value of arm 'a' has shape \(\)"),
    "ids": (({"a": {"user": ["x", "y"], "m": [1, 2]}}, "a"), {}, "column 'user' of arm 'a' is text; name the metrics"),
    "alpha of a list": (({"a": MANY}, "a"), {"alpha": np.ones(999)}, "alpha of type ndarray must be between 0 and 1"),
    "alpha": (({"a": MANY}, "a"), {"alpha": 5}, "alpha=5 must be between 0 and 1"),
    "alpha text": (({"a": MANY}, "a"), {"alpha": "5%"}, "alpha='5%' must be between 0 and 1"),
    "planned": (({"a": MANY}, "a"), {"planned_users": 0}, "planned_users=0 must be the number of users planned"),
    "covariate": (({"a": {"x": MANY}}, "a"), {"covariate": "w"}, "covariate='w' is no column of arm 'a'"),
    "paired": (({"a": MANY, "b": [1]}, "a"), {"paired": True}, "paired arms have the same users, but they have"),
    "paired covariate": (({"a": {"x": MANY}}, "a"), {"paired": True, "covariate": "x"}, "adjusts nothing; leave it"),
    "metric": (({"a": {"x": MANY}}, "a"), {"metrics": ["y"]}, r"'y', no column of arm 'a'; it has \['x'\]"),
    "one string": (({"a": {"x": MANY}}, "a"), {"metrics": "x"}, "metrics='x' is one string; give a list of columns"),
    "three parts": (({"a": {"x": MANY}}, "a"), {"metrics": {"r": ("x", "x", "x")}}, "has 3 parts; give .numerator"),
    "array": (({"a": {"x": MANY}}, "a"), {"metrics": {"r": np.ones(3)}}, "needs .*no column of arm 'a'"),
    "function": (({"a": {"x": MANY}}, "a"), {"metrics": {"m": lambda t: 1.0}}, r"m of arm 'a' has shape \(\) and its"),
}


@pytest.mark.parametrize(("given", "options", "message"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused_in_one_line(given, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        compare(*given, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("counts", "shares", "message"),
    [
        ([5, 5], None, "counts is of type list; give a number for each arm"),
        ({"a": 5, "b": math.nan}, None, r"counts\['b'\]=nan must be a number of users"),
        ({"a": 5, "b": math.inf}, None, r"counts\['b'\]=inf must be a number of users"),
        ({"a": 5, "b": -1}, None, r"counts\['b'\]=-1 must be"),
        ({"a": 5, "b": 1.5}, None, r"counts\['b'\]=1.5 must be"),
        ({"a": 5, "b": 5}, {"a": 1.0, "b": 0.0}, r"shares\['b'\]=0.0 must be above 0"),
        ({"a": 5}, None, "one number for each arm"),
        ({"a": 0, "b": 0}, None, "some > 0"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts, shares, message):
    with pytest.raises(ValueError, match=message):
        sample_ratio_mismatch(counts, shares)


def test_counts_beyond_64_bits():
    assert sample_ratio_mismatch({"a": 10**20, "b": 10**20}) == 1.0
    assert sample_ratio_mismatch({"a": np.int32(2**31 - 1), "b": np.int32(2**31 - 1)}) == 1.0


def test_an_effect_is_one_line(arms):
    effect = compare(arms, "control", metrics=["likes"])["treatment"]["likes"]
    for text in (str(effect), repr(effect), f"{effect}", f"{effect:.2f}"):
        assert "\n" not in text
    assert f"{effect:.2f}".startswith(f"{effect.value:.2f}, {effect.diff:+.2f} [{effect.low:+.2f}, ")
    assert str(mmrf.Estimate(1 / 3, 0.25, 0.5, 30)) == "0.3333 [0.25, 0.5], n=30"
    assert f"{mmrf.Estimate(1 / 3, 0.25, 0.5, 30, ess=12.34):.1f}" == "0.3 [0.2, 0.5], n=30, ess=12.3"
    assert str(mmrf.Estimate(math.nan, note="no rows")) == "nan [nan, nan], n=0 (no rows)"
