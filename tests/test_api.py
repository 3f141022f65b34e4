"""The public functions of `mmrf_jax.metrics`, `mmrf_jax.ope` and `mmrf_jax.abtest` against independent libraries."""

import doctest
import importlib
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

import mmrf_jax as mmrf

ROOT = Path(__file__).resolve().parents[1]


def test_importing_takes_no_jax():
    script = (
        "import sys, mmrf_jax as mmrf\n"
        "mmrf.metrics.gauc, mmrf.ope.estimate, mmrf.abtest.compare, mmrf.Estimate\n"
        "assert 'jax' not in sys.modules and set(mmrf.__all__) <= set(dir(mmrf)) | {'__version__'}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'metric'; its public names are"):
        _ = mmrf.metric


@pytest.mark.parametrize("name", ["metrics", "ope", "abtest.effects"])
def test_examples_print_what_they_say(name):
    found = doctest.testmod(importlib.import_module(f"mmrf_jax.{name}"))
    assert found.attempted and not found.failed


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    group = np.array([f"user {i}" for i in rng.integers(0, 60, 1500)])
    score = rng.integers(0, 8, 1500) / 8  # with ties
    return group, score, (rng.random(1500) < 0.2 + 0.4 * score).astype(int), np.round(rng.exponential(size=1500), 1)


def test_gauc_is_scikit_learns_by_group(rows):
    group, score, label, _ = rows
    of = {g: (label[group == g], score[group == g]) for g in np.unique(group)}
    wanted = np.average([roc_auc_score(*x) for x in of.values()], weights=[len(x[0]) for x in of.values()])
    found = mmrf.metrics.gauc(label, score, group)
    assert found.value == pytest.approx(wanted, abs=1e-12) and found.n == 60 and found.low < wanted < found.high
    pairs = [(g, "x") for g in group]  # any hashable
    assert mmrf.metrics.gauc(list(label), list(score), pairs) == found
    assert str(found).startswith(f"{wanted:.4g} [")


def test_xauc_is_the_share_of_pairs(rows):
    group, score, _, seconds = rows
    values, weights = [], []
    for g in np.unique(group):
        s, t = score[group == g], seconds[group == g]
        pairs = [(i, j) for i, j in itertools.combinations(range(len(s)), 2) if t[i] != t[j]]
        values.append(np.mean([0.5 if s[i] == s[j] else float((s[i] < s[j]) == (t[i] < t[j])) for i, j in pairs]))
        weights.append(len(s))
    assert mmrf.metrics.xauc(seconds, score, group).value == pytest.approx(np.average(values, weights=weights))


def test_what_no_group_decides_is_nan_with_a_reason():
    found = mmrf.metrics.gauc([1, 1, 0], [0.1, 0.2, 0.3], [1, 1, 2])
    assert math.isnan(found.value) and found.note == "no group has both classes" and found.n == 0
    few = mmrf.metrics.gauc([1, 0], [0.1, 0.2], [1, 1])
    assert few.value == 0.0 and math.isnan(few.low) and "1 groups count, it needs 25" in few.note


def test_off_policy_estimates_by_their_formulas():
    rng = np.random.default_rng(1)
    logged, target = rng.uniform(0.01, 1.0, 400), rng.uniform(0.0, 1.0, 400)
    target[:5] = 0.0
    reward, q, q_target = rng.random(400) * (rng.random(400) < 0.6), rng.random(400), rng.random(400)
    session = rng.integers(0, 90, 400)
    w = target / logged
    capped = np.minimum(w, 3.0)
    found = mmrf.ope.estimate(
        reward,
        pscore=logged,
        target_pscore=target,
        group=session,
        cap=3.0,
        reward_model=(q, q_target),
        estimators=("ips", "snips", "ncis", "dr", "dm"),
    )
    wanted = {
        "ips": np.mean(w * reward),
        "snips": np.sum(w * reward) / np.sum(w),
        "ncis": np.sum(capped * reward) / np.sum(capped),
        "dr": np.mean(q_target + capped * (reward - q)),
        "dm": np.mean(q_target),
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].value == pytest.approx(value, abs=1e-10), name
        assert found[name].low < value < found[name].high and found[name].n == len(np.unique(session))
    assert found["ips"].ess == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert found["dr"].ess == pytest.approx(capped.sum() ** 2 / (capped**2).sum()) and math.isnan(found["dm"].ess)
    plain = mmrf.ope.estimate(reward, pscore=logged, target_pscore=target, estimators=("dr",), cap=np.inf)["dr"]
    assert plain.value == pytest.approx(reward.mean() + np.mean(w * (reward - reward.mean()))) and plain.n == 400


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"estimators": ("ipw",)}, "unknown estimator 'ipw'; choose among ips, snips"),
        ({"pscore": [0.0, 0.5]}, "pscore of row 0 is 0.0; probabilities are above 0 and at most 1"),
        ({"target_pscore": [0.5, 1.5]}, "target_pscore of row 1 is 1.5"),
        ({"pscore": [0.5]}, r"pscore has shape \(1,\) and reward \(2,\)"),
    ],
)
def test_off_policy_estimates_refuse_what_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        mmrf.ope.estimate([1.0, 0.0], **{"pscore": [0.5, 0.5], "target_pscore": [0.5, 0.5]} | given)


def test_effects_are_scipys():
    rng = np.random.default_rng(2)
    arms = {"old": {"likes": rng.poisson(1.0, 300)}, "new": {"likes": rng.poisson(1.3, 260)}}
    found = mmrf.abtest.compare(arms, control="old")
    welch = stats.ttest_ind(arms["new"]["likes"], arms["old"]["likes"], equal_var=False)
    effect = found["new"]["likes"]
    assert (effect.low, effect.high) == pytest.approx(tuple(welch.confidence_interval(0.95)))
    assert effect.p_value == pytest.approx(welch.pvalue) and effect.n == 260
    assert effect.diff == pytest.approx(effect.value - arms["old"]["likes"].mean())
    assert effect.diff_pct == pytest.approx(100 * effect.diff / arms["old"]["likes"].mean())
    assert (found["old"]["likes"].diff, found["old"]["likes"].p_value) == (0.0, 1.0)
    both = {"old": arms["old"], "new": {"likes": arms["old"]["likes"] + rng.normal(0.1, 1.0, 300)}}
    paired = mmrf.abtest.compare(both, control="old", paired=True, alpha=0.1)["new"]["likes"]
    test = stats.ttest_rel(both["new"]["likes"], both["old"]["likes"])
    assert (paired.low, paired.high) == pytest.approx(tuple(test.confidence_interval(0.9)))
    assert paired.p_value == pytest.approx(test.pvalue)


def test_a_covariate_narrows_the_interval_around_the_same_effect():
    rng = np.random.default_rng(3)
    before = {arm: rng.normal(10.0, 3.0, 400) for arm in ("a", "b")}
    arms = {arm: {"after": x + rng.normal(0.5 * (arm == "b"), 1.0, 400), "before": x} for arm, x in before.items()}
    plain = mmrf.abtest.compare({arm: {"after": x["after"]} for arm, x in arms.items()}, control="a")["b"]["after"]
    found = mmrf.abtest.compare(arms, control="a", covariate="before")["b"]
    assert set(found) == {"after"}
    cuped = found["after"]
    assert cuped.high - cuped.low < 0.5 * (plain.high - plain.low) and cuped.low < 0.5 < cuped.high


def test_effects_that_events_cannot_carry_have_a_reason():
    arms = {"a": {"hate": [0] * 99 + [1]}, "b": {"hate": [0] * 70 + [1] * 30}}
    effect = mmrf.abtest.compare(arms, control="a")["b"]["hate"]
    assert effect.diff == pytest.approx(0.29) and math.isnan(effect.p_value) and math.isnan(effect.low)
    assert effect.note == "no interval: 1 users of a have any, it needs 25"
    alike = mmrf.abtest.compare({"a": {"x": [1.0] * 30}, "b": {"x": [1.0] * 30}}, control="a")["b"]["x"]
    assert math.isnan(alike.p_value) and "alike" in alike.note


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        ({"a": {"x": [1]}}, {"control": "c"}, "control='c' is no arm; choose among 'a'"),
        ({"a": {"x": [1]}, "b": {"y": [1]}}, {"control": "a"}, r"arm 'b' has columns \['y'\]"),
        ({"a": {"x": [1, np.nan]}}, {"control": "a"}, "x of arm 'a' has 1 numbers that are not finite"),
        ({"a": {"x": [1, 2], "z": [1]}}, {"control": "a"}, "one number for each user"),
        ({"a": {"x": [1, 2]}, "b": {"x": [1]}}, {"control": "a", "paired": True}, "paired arms have the same users"),
        ({"a": {"x": [1]}}, {"control": "a", "covariate": "w"}, "covariate='w' is no column"),
    ],
)
def test_comparisons_refuse_what_cannot_be(arms, options, message):
    with pytest.raises(ValueError, match=message):
        mmrf.abtest.compare(arms, **options)


def test_sample_ratios_are_scipys():
    counts = {"control": 5200, "treatment": 4800}
    assert mmrf.abtest.sample_ratio_mismatch(counts) == pytest.approx(stats.chisquare([5200, 4800]).pvalue)
    shares = {"control": 0.52, "treatment": 0.48}
    assert mmrf.abtest.sample_ratio_mismatch(counts, shares) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="give a share for each arm"):
        mmrf.abtest.sample_ratio_mismatch(counts, {"control": 1.0})


TRAINS = {"quickstart", "own_logs"}
EXAMPLES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in TRAINS else [])
    for path in sorted((ROOT / "examples").glob("*.py"))
]


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples_run(path, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr
