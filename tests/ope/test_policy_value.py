"""Off-policy estimates: intervals by a loop over drawn units, limits, slates by hand, what is undefined, nonsense."""

import math
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest

import mmrf_jax as mmrf
from mmrf_jax.ope import estimate, estimators, policy_value, slates

TIGHT = {"rel": 1e-10, "abs": 1e-12}
SINGLE = ("ips", "snips", "ncis", "dr", "dm", "sndr", "switch_dr", "dros")
SLATE = ("sips", "iips", "rips", "snsips", "sniips", "snrips", "cascade_dr")
HALF = [0.5, 0.5]


@pytest.fixture(scope="module")
def log():
    """A log of slates of one to four slots; users have several."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5, 150)
    slate = np.repeat(np.arange(150), lengths)
    n = len(slate)
    return {
        "reward": rng.random(n) * (rng.random(n) < 0.6),
        "pscore": rng.uniform(0.1, 1.0, n),
        "target_pscore": rng.uniform(0.0, 1.0, n),
        "slate_id": [f"slate {i}" for i in slate],
        "position": np.concatenate([np.arange(k) * 10 for k in lengths]),
        "group": (slate * 7 % 60).astype(str),
        "reward_model": (rng.random(n), rng.random(n)),
    }


def loop(log, rows):
    """All estimators of some rows, slates after slates, from their definitions; cap 3, τ 2, λ 5."""
    w, r = log["target_pscore"][rows] / log["pscore"][rows], log["reward"][rows]
    q, v = (x[rows] for x in log["reward_model"])
    capped = np.minimum(w, 3.0)
    found = {
        "ips": np.mean(w * r),
        "snips": (w * r).sum() / w.sum(),
        "ncis": (capped * r).sum() / capped.sum(),
        "dr": np.mean(v + capped * (r - q)),
        "dm": np.mean(v),
        "sndr": np.mean(v) + np.mean(w * (r - q)) / np.mean(w),
        "switch_dr": np.mean(v + w * (w <= 2.0) * (r - q)),
        "dros": np.mean(v + 5.0 * w / (w**2 + 5.0) * (r - q)),
    }
    top = log["position"][rows] == 0
    running, above, whole = np.empty(len(r)), np.empty(len(r)), np.empty(len(r))
    for start, end in zip(np.flatnonzero(top), [*np.flatnonzero(top)[1:], len(r)], strict=True):
        running[start:end] = np.cumprod(w[start:end])
        above[start:end] = [1.0, *running[start : end - 1]]
        whole[start:end] = running[end - 1]
    places = [log["position"][rows] == p for p in np.unique(log["position"][rows])]

    def by_place(weight):
        return sum((weight[at] * r[at]).sum() / weight[at].mean() for at in places) / top.sum()

    return found | {
        "sips": (whole * r).sum() / top.sum(),
        "iips": (w * r).sum() / top.sum(),
        "rips": (running * r).sum() / top.sum(),
        "snsips": (whole * r).sum() / whole.mean() / top.sum(),
        "sniips": by_place(w),
        "snrips": by_place(running),
        "cascade_dr": (running * (r - q) + above * v).sum() / top.sum(),
    }


def test_values_and_intervals_are_those_of_a_loop_over_drawn_units(log):
    options = {"cap": 3.0, "tau": 2.0, "shrinkage": 5.0, "draws": 40, "seed": 3, "level": 0.9}
    found = estimate(estimators=SINGLE + SLATE, **log, **options)
    assert found.keys() == set(SINGLE + SLATE)
    units = [np.flatnonzero(log["group"] == one) for one in dict.fromkeys(log["group"])]
    drawn = np.random.default_rng(3).integers(0, len(units), (40, len(units)), dtype=np.int32)
    again = [loop(log, np.concatenate([units[u] for u in draw])) for draw in drawn]
    for name, value in loop(log, np.arange(len(log["reward"]))).items():
        low, high = np.quantile([x[name] for x in again], [0.05, 0.95])
        assert (found[name].value, found[name].low, found[name].high) == pytest.approx((value, low, high), **TIGHT), (
            name
        )
        assert found[name].n == 60 and not found[name].note


def test_effective_sample_sizes_are_of_each_estimators_weights(log):
    found = estimate(estimators=SINGLE + SLATE, **log, cap=3.0, tau=2.0, shrinkage=5.0, draws=1)
    w = log["target_pscore"] / log["pscore"]
    wanted = {"ips": w, "sndr": w, "iips": w, "ncis": np.minimum(w, 3.0), "switch_dr": w * (w <= 2.0)}
    wanted |= {"dros": 5.0 * w / (w**2 + 5.0)}
    for name, weight in wanted.items():
        assert found[name].ess == pytest.approx(weight.sum() ** 2 / (weight**2).sum()), name
    assert math.isnan(found["dm"].ess) and found["rips"].ess < found["iips"].ess


def test_limits_of_the_estimators(log):
    single = {name: log[name] for name in ("reward", "pscore", "target_pscore", "reward_model")}
    names = ("dm", "dr", "switch_dr", "dros")
    none = estimate(**single, estimators=names, cap=1e-300, tau=0.0, shrinkage=0.0)
    whole = estimate(**single, estimators=names, cap=math.inf, tau=math.inf, shrinkage=math.inf)
    for name in ("dr", "switch_dr", "dros"):
        assert none[name].value == pytest.approx(none["dm"].value, rel=1e-12)
        assert whole[name].value == pytest.approx(whole["dr"].value, rel=1e-12)
    # A right model needs no weights; of the logging policy itself, all but the model's word are the mean.
    perfect = dict(log, reward_model=(log["reward"], log["reward_model"][1]))
    right = estimate(**perfect, estimators=("dr", "sndr", "switch_dr", "dros", "dm"))
    assert len({round(x.value, 12) for x in right.values()}) == 1
    itself = dict(log, target_pscore=log["pscore"], reward_model=None)
    found = estimate(**itself, estimators=SINGLE + SLATE)
    for name in SINGLE:
        assert found[name].value == pytest.approx(np.mean(log["reward"]), rel=1e-12), name
    for name in SLATE:
        assert found[name].value == pytest.approx(log["reward"].sum() / 150, rel=1e-12), name


def test_cascades_by_hand():
    """Two slates of two and one slots, given from the bottom: weights (2, 1/2) and 3, rewards (1, 4) and 2."""
    log = {
        "reward": [4.0, 1.0, 2.0],
        "pscore": [0.8, 0.3, 0.2],
        "target_pscore": [0.4, 0.6, 0.6],
        "slate_id": ["x", "x", "y"],
        "position": [2, 1, 1],
    }
    found = estimate(**log, estimators=SLATE)
    assert found["rips"].value == pytest.approx((2 * 1 + 1 * 4 + 3 * 2) / 2)
    assert found["iips"].value == pytest.approx((2 * 1 + 0.5 * 4 + 3 * 2) / 2)
    assert found["sips"].value == pytest.approx((1 * 1 + 1 * 4 + 3 * 2) / 2)
    assert found["sniips"].value == pytest.approx(((2 * 1 + 3 * 2) / 2.5 + 4) / 2)
    # By default q is the mean of the rest of the slate at a position: (5 + 2) / 2 and 4.
    wanted = 2 * (1 - 3.5) + 3.5 + 1 * (4 - 4) + 2 * 4 + 3 * (2 - 3.5) + 3.5
    assert found["cascade_dr"].value == pytest.approx(wanted / 2) and found["cascade_dr"].n == 2
    shuffled = {name: [x[i] for i in (1, 2, 0)] for name, x in log.items()}
    assert estimate(**shuffled, estimators=("rips",))["rips"].value == found["rips"].value
    del shuffled["position"]  # then rows are in order
    assert estimate(**shuffled, estimators=("rips",))["rips"].value == found["rips"].value


def test_cascade_estimates_are_right_where_users_go_from_the_top_down():
    """Rewards of the second slot depend on the first item: RIPS and cascade-DR find the truth, IIPS does not."""
    rng, n = np.random.default_rng(1), 20_000
    behaviour, target = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    value = np.array([[0.2, 0.4], [0.9, 0.1]])  # reward of the second slot, by the items of both
    items = (rng.random((n, 2)) < behaviour[1]).astype(int)
    reward = np.stack([np.zeros(n), value[items[:, 0], items[:, 1]] + rng.normal(0, 0.1, n)], axis=1)
    truth = target @ value @ target
    to_go = value @ target  # Q of the first slot
    q = np.stack([to_go[items[:, 0]], value[items[:, 0], items[:, 1]]], axis=1)
    v = np.stack([np.full(n, target @ to_go), to_go[items[:, 0]]], axis=1)
    log = {"reward": reward.ravel(), "pscore": behaviour[items].ravel(), "target_pscore": target[items].ravel()}
    log |= {"slate_id": np.repeat(np.arange(n), 2), "reward_model": (q.ravel(), v.ravel())}
    found = estimate(**log, estimators=("iips", "rips", "cascade_dr"), draws=100)
    assert found["rips"].low < truth < found["rips"].high and found["cascade_dr"].low < truth < found["cascade_dr"].high
    assert not found["iips"].low < truth < found["iips"].high
    widths = {name: x.high - x.low for name, x in found.items()}
    assert widths["cascade_dr"] < 0.7 * widths["rips"]


def test_public_and_internal_estimates_agree(log):
    rows = estimators.LoggedDecisions(
        np.unique(log["group"], return_inverse=True)[1],
        np.log(log["target_pscore"] / log["pscore"]),
        log["reward"][:, None],
        *(x[:, None] for x in log["reward_model"]),
    )
    inner = estimators.estimate(rows, ("r",), (4.0, math.inf), draws=20)["signals"]["r"]
    found = estimate(**log, estimators=SINGLE, cap=4.0, draws=20)
    pairs = {"ips": inner["ips"]["inf"], "snips": inner["ncis"]["inf"], "ncis": inner["ncis"]["4"]}
    for name, entry in (pairs | {"dr": inner["dr"]["4"], "dm": inner["dm"]}).items():
        assert found[name].value == pytest.approx(entry["value"], rel=1e-12), name


def test_of_sessions_rips_is_the_per_decision_estimator(log):
    """A session is a slate of requests (Precup et al., 2000)."""
    slate, lengths = np.unique([int(one.split()[1]) for one in log["slate_id"]], return_counts=True)
    offsets, log_weight = np.concatenate([[0], np.cumsum(lengths)]), np.log(log["target_pscore"] / log["pscore"])
    inner = estimators.per_decision(
        slate, offsets, log_weight, log["reward"][:, None], 1.0, ("r",), (math.inf,), draws=9
    )
    found = estimate(**log, estimators=("rips",), draws=9)["rips"]
    assert found.value == pytest.approx(inner["signals"]["r"]["ips"]["inf"]["value"], rel=1e-12)


def test_intervals_of_slates_cover_the_truth():
    """Two slots whose rewards depend on both items; 150 logs of 300 slates."""
    rng, behaviour, target = np.random.default_rng(2), np.array([0.6, 0.4]), np.array([0.3, 0.7])
    click = np.array([[0.2, 0.5], [0.7, 0.3]])
    truth = 0.4 * target[1] + target @ click @ target
    inside: dict[str, list[bool]] = {name: [] for name in ("rips", "snrips", "sips", "cascade_dr")}
    for _ in range(150):
        items = (rng.random((300, 2)) < behaviour[1]).astype(int)
        chance = np.stack([0.4 * items[:, 0], click[items[:, 0], items[:, 1]]], axis=1)
        found = estimate(
            (rng.random((300, 2)) < chance).ravel(),
            pscore=behaviour[items].ravel(),
            target_pscore=target[items].ravel(),
            slate_id=np.repeat(np.arange(300), 2),
            estimators=tuple(inside),
            draws=200,
        )
        for name, x in found.items():
            inside[name].append(x.low < truth < x.high)
    for name, hits in inside.items():
        assert 0.89 <= np.mean(hits) <= 0.99, name


def test_slates_of_rows_in_any_order():
    found = slates.of_rows(["b", "a", "b", "a", "b"], [3, 2, 1, 1, 2], 5)
    assert found.slate.tolist() == [0, 1, 0, 1, 0] and found.above.tolist() == [4, 3, 2, 3, 2]
    assert found.place.tolist() == [2, 1, 0, 0, 1] and found.top.tolist() == [False, False, True, True, False]
    values = np.array([2.0, 3.0, 5.0, 7.0, 11.0])
    assert found.running_product(values).tolist() == [110.0, 21.0, 5.0, 7.0, 55.0]
    assert found.product(values).tolist() == [110.0, 21.0, 110.0, 21.0, 110.0]
    assert found.sum_to_end(values).tolist() == [2.0, 3.0, 18.0, 10.0, 13.0]


@pytest.mark.parametrize("make", [list, tuple, pd.Series, pl.Series, np.float32, lambda x: np.asarray(x, object)])
def test_columns_of_any_kind(make):
    logged, target = [0.5, 0.25, 1.0, 0.5] * 20, [0.25, 0.5, 0.0, 1.0] * 20
    wanted = estimate([1.0, 0.0, 1.0, 1.0] * 20, pscore=logged, target_pscore=target)
    assert estimate(make([1, 0, 1, 1] * 20), pscore=make(logged), target_pscore=make(target)) == wanted
    assert estimate([True, False, True, True] * 20, pscore=logged, target_pscore=target) == wanted
    assert estimate([1, 0, 1, 1] * 20, pscore=logged, target_pscore=target, group=pd.Series(range(80))) == wanted


SLATES = {"slate_id": [1, 1], "estimators": SLATE}
UNDEFINED = {
    "no rows": ({"reward": [], "pscore": [], "target_pscore": []}, {}, math.nan, "no rows"),
    "no slates": ({"reward": [], "pscore": [], "target_pscore": [], **SLATES, "slate_id": []}, {}, math.nan, "no rows"),
    "one row": ({"reward": [1], "pscore": [0.5], "target_pscore": [0.5]}, {}, 1.0, "1 units have any reward, it needs"),
    "one group": ({"reward": [1] * 50, "group": ["u"] * 50}, {}, 1.0, "no interval: 1 units have any reward"),
    "24 events": ({"reward": [1] * 24 + [0] * 76}, {}, 0.24, "no interval: 24 units have any reward, it needs 25"),
    "no events": ({"reward": [0] * 100}, {}, 0.0, "no interval: 0 units have any reward"),
    "few units, no events counted": ({"reward": [0] * 9, "estimators": ("dm",)}, {}, 0.0, "no interval: 9 units, it"),
    "a target elsewhere": (
        {"reward": [1] * 50, "target_pscore": [0.0] * 50, "estimators": ("snips", "ncis", "sndr")},
        {},
        math.nan,
        "all weights are 0: the target policy takes none of the logged decisions",
    ),
    "a target elsewhere where rewards are": (
        {"reward": [0, 1] * 50, "target_pscore": [0.5, 0.0] * 50, "estimators": ("ips", "snips", "ncis")},
        {},
        0.0,
        "no interval: 0 units have any reward of weight above 0, it needs 25",
    ),
    "a target elsewhere at a position": (
        {
            "reward": [1] * 50,
            "target_pscore": [0.5, 0.0] * 25,
            "slate_id": np.arange(50) // 2,
            "estimators": ("sniips",),
        },
        {},
        math.nan,
        "all weights of a position are 0",
    ),
    "too large": ({"reward": [1e308] * 50, "estimators": ("ips", "dr")}, {}, math.nan, "too large"),
}


@pytest.mark.parametrize(("given", "options", "value", "note"), UNDEFINED.values(), ids=UNDEFINED)
def test_what_is_undefined_is_nan_with_a_reason(given, options, value, note):
    half = {"pscore": [0.5] * len(given["reward"]), "target_pscore": [0.5] * len(given["reward"])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimate(**(half | given), **options)
    for name, x in found.items():
        assert x.value == pytest.approx(value, nan_ok=True), name
        assert math.isnan(x.low) and math.isnan(x.high) and note in x.note and "\n" not in str(x), name


def test_tiny_propensities_and_constant_rewards_have_values():
    found = estimate([1.0] * 40, pscore=[1e-320] * 40, target_pscore=[1.0] * 40, estimators=("ips", "snips", "ncis"))
    assert found["snips"].value == 1.0 and found["ncis"].value == 1.0 and found["ips"].value > 1e100
    rounded = estimate([1.0] * 40, pscore=[1.0000001] * 40, target_pscore=[1.0] * 40)  # a softmax in float32
    assert rounded["snips"].value == pytest.approx(1.0)


def test_draws_beyond_float64_have_no_interval():
    one = {"reward": [1e306] * 100 + [-1e306] * 100, "pscore": [0.5] * 200, "target_pscore": [0.5] * 200}
    found = estimate(**one, group=list(range(100)) * 2)["ips"]  # a unit's rewards cancel
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    long = {"reward": [1.0] * 2000, "pscore": [1e-3] * 2000, "target_pscore": [1.0] * 2000}
    found = estimate(
        **long, slate_id=np.arange(2000) // 500, group=[0] * 2000, estimators=("rips", "cascade_dr", "snrips")
    )
    assert all(math.isnan(x.low) and math.isfinite(x.value) for x in found.values())


def test_a_slate_of_many_rows():
    found = estimate(
        [1.0] * 1000, pscore=[0.5] * 1000, target_pscore=[0.5] * 1000, estimators=SLATE, slate_id=[0] * 1000
    )
    assert all(x.value == pytest.approx(1000.0) for x in found.values())


def test_the_order_of_names_and_repeated_names():
    found = estimate([1.0, 0.0], pscore=HALF, target_pscore=HALF, estimators=["dr", "ips", "dr"])
    assert list(found) == ["dr", "ips"]
    assert estimate([1.0, 0.0], pscore=HALF, target_pscore=HALF, estimators=()) == {}


NONSENSE = {
    "estimator": ({"estimators": ("ipw",)}, "unknown estimator 'ipw'; choose among ips, snips, .*cascade_dr"),
    "one string": ({"estimators": "ips"}, r"estimators='ips' is one string; give a tuple of names, such as \('ips',\)"),
    "no slates": ({"estimators": ("rips",)}, "estimator 'rips' needs slate_id="),
    "position alone": ({"position": [1, 2]}, "position= is of slots in slates; give slate_id="),
    "position twice": ({**SLATES, "position": [1, 1]}, "position of row 1 is 1, as that of row 0 of the same slate"),
    "position": ({**SLATES, "position": ["top", "second"]}, "position is of <U6, .*give numbers"),
    "slates apart": ({**SLATES, "group": ["a", "b"]}, "group of row 1 differs from that of row 0, of the same slate"),
    "no probability": ({"pscore": [0.0, 0.5]}, "pscore of row 0 is 0.0; probabilities are above 0 and at most 1"),
    "negative": ({"target_pscore": [0.5, -0.1]}, "target_pscore of row 1 is -0.1; probabilities are 0 or more"),
    "above 1": ({"target_pscore": [0.5, 1.5]}, "target_pscore of row 1 is 1.5"),
    "inf": ({"pscore": [0.5, math.inf]}, "pscore of row 1 is inf"),
    "nan": ({"pscore": [0.5, math.nan]}, "pscore has 1 numbers that are not finite, first nan in row 1"),
    "lengths": ({"pscore": [0.5]}, r"pscore has shape \(1,\) and reward \(2,\); give one number for each row"),
    "2-d": ({"pscore": [[0.5, 0.5]]}, r"pscore has shape \(1, 2\) and reward \(2,\)"),
    "ragged": ({"pscore": [[0.5], [0.5, 0.5]]}, "pscore has rows of several lengths; give one number for each row"),
    "strings": ({"pscore": ["a", "b"]}, "pscore is of <U1, such as .'a'.; give numbers"),
    "missing": ({"pscore": [0.5, None]}, "pscore has a row that is no number .None.; leave it out or convert it"),
    "complex": ({"pscore": [0.5, 0.5j]}, "pscore is of complex128"),
    "masked": ({"pscore": np.ma.array(HALF, mask=[0, 1])}, "pscore has 1 masked rows; leave them out"),
    "reward": ({"reward": [1.0, math.inf]}, "reward has 1 numbers that are not finite, first inf in row 1"),
    "group length": ({"group": ["a"]}, "group has 1 ids for 2 rows; give one id for each row"),
    "no id": ({"group": ["a", None]}, "group of row 1 is None; leave out rows without an id"),
    "nan id": ({"group": [math.nan, 1.0]}, "group of row 0 is nan; leave out rows without an id"),
    "no ids": ({"group": 3}, "group is 3; give one hashable id for each row"),
    "2-d ids": ({"group": np.zeros((2, 2))}, "group is array.*give one hashable id for each row"),
    "cap": ({"cap": 0.0}, "cap=0.0 must be above 0, inf for none"),
    "cap nan": ({"cap": math.nan}, "cap=nan must be above 0"),
    "cap text": ({"cap": "10"}, "cap='10' must be above 0"),
    "tau": ({"tau": -1.0}, "tau=-1.0 must be 0 or more"),
    "shrinkage": ({"shrinkage": math.nan}, "shrinkage=nan must be 0 or more"),
    "level": ({"level": 95}, "level=95 must be a coverage between 0 and 1"),
    "draws": ({"draws": 0}, "draws=0 must be the number of bootstrap samples, 1 or more"),
    "draws of half": ({"draws": 100.0}, "draws=100.0 must be the number"),
    "seed": ({"seed": -1}, "seed=-1 must be an integer, 0 or more"),
    "model": ({"reward_model": [1.0]}, "reward_model must be a pair"),
    "model of one": ({"reward_model": (HALF, [0.5])}, r"reward_model\[1\] has shape \(1,\) and reward \(2,\)"),
    "model nan": ({"reward_model": (HALF, [0.5, math.nan])}, r"reward_model\[1\] has 1 numbers that are not finite"),
}


@pytest.mark.parametrize(("given", "message"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused_in_one_line(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        estimate(**({"reward": [1.0, 0.0], "pscore": HALF, "target_pscore": HALF} | given))
    assert "\n" not in str(caught.value)


def test_every_estimator_is_documented():
    for name in policy_value._ESTIMATORS:
        assert f"`{name}`" in mmrf.ope.estimate.__doc__, name
