"""A/B tests in the world: who is in which arm, what is known of users before, analyses, and A/A tests."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from in_memory import compare_sums

from mmrf_jax.abtest import aa, assignment, sequential, simulate, statistics, summary
from mmrf_jax.envs import rankers, rollout
from mmrf_jax.envs.short_video import env, parameters, reference_policies
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.signals import SHORT_VIDEO

CONFIG = parameters.WorldConfig(num_videos=3000, candidates=20, slate=3, history=8, max_requests=12)
USERS = 800  # as in test_simulate_days, so that all is compiled once
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def sim():
    return env.make_world(CONFIG)


@pytest.fixture(scope="module")
def policies():
    return {
        "production": rankers.PrivilegedPolicy(reference_policies.production, 1.0),
        "oracle": rankers.PrivilegedPolicy(reference_policies.oracle_planning, 0.0),
    }


@pytest.fixture(scope="module")
def everyone(sim, policies):
    """Sums [USERS] of all users in every arm."""
    options = {"user_ids": np.arange(USERS), "day": 2}
    return {
        name: simulate.rollout_user_metrics(sim, policy, KEY, Partitioner(), **options)
        for name, policy in policies.items()
    }


@pytest.fixture(scope="module")
def histories(sim):
    return simulate.history_means(sim, KEY, np.arange(USERS), 2, 512)


def run(sim, policies, users, progress=lambda done: None, **options):
    design = simulate.Design("production", users, **options)
    return simulate.simulate_ab_test(sim, policies, KEY, Partitioner(), design, day=2, progress=progress)


def columns(sums, rows):
    """What a test is given of some users, by hand; without exposures."""
    return {name: x[rows] for name, x in sums.items() if name not in (*simulate.NOT_TESTED, "exposures")}


def test_users_of_any_ids_are_served_as_in_a_row(sim, policies, everyone):
    ids = np.random.default_rng(0).permutation(USERS)[:520]
    served = simulate.rollout_user_metrics(
        sim, policies["production"], KEY, Partitioner(), user_ids=ids, day=2, capacity=USERS
    )
    np.testing.assert_array_equal(served["user_id"], ids)
    for name in ("watch_time", "requests", "next_visit", "like"):
        np.testing.assert_allclose(served[name], everyone["production"][name][ids], rtol=1e-4)
    assert served["exposures"].sum() == served["depth"].sum()


def test_history_means_are_those_of_the_arrival(sim, histories):
    history = jax.jit(env.reset)(KEY, sim.default_params, jnp.arange(100), 2)[1]
    assert histories.shape == (USERS, len(SHORT_VIDEO))
    np.testing.assert_allclose(histories[:100], np.asarray(history.feedback, np.float64).mean(axis=1), rtol=1e-4)
    assert len(simulate.history_means(sim, KEY, np.arange(0), 2, 512)) == 0


def test_each_user_is_in_one_arm_by_hash(sim, policies, everyone, histories):
    result = run(sim, policies, USERS // 2, salt="ranker", cuped=True)
    arm = assignment.assign(np.arange(USERS), [0.5, 0.5], "ranker")
    rows = {name: np.flatnonzero(arm == i) for i, name in enumerate(policies)}
    expected = compare_sums(
        SHORT_VIDEO,
        {name: columns(everyone[name], x) for name, x in rows.items()},
        "production",
        False,
        {name: histories[x] for name, x in rows.items()},
    )["ab_test"]
    for name, metrics in expected.items():
        for metric, entry in metrics.items():
            found = result["ab_test"][name][metric]
            assert (found["ci95"] is None) == (entry["ci95"] is None)
            numbers = [[x["mean"], *(x["ci95"] or [])] for x in (found, entry)]
            np.testing.assert_allclose(*numbers, rtol=2e-3)
    assert {"coverage", "gini"} <= result["ab_test"]["oracle"].keys()
    counts = np.bincount(arm)
    assert result["sample_ratio_mismatch"]["users"] == {"production": counts[0], "oracle": counts[1]}
    assert result["sample_ratio_mismatch"]["p_value"] == assignment.sample_ratio_mismatch(counts, [1, 1]) > 0.001
    cut = 100 * everyone["oracle"]["truncated"][rows["oracle"]].mean()
    assert result["truncated_pct"]["oracle"] == pytest.approx(cut)


def test_what_histories_explain_narrows_the_intervals(sim, policies, everyone, histories):
    arm = np.arange(USERS) % 2
    rows = {name: np.flatnonzero(arm == i) for i, name in enumerate(policies)}
    sums = {name: columns(everyone["production"], x) for name, x in rows.items()}
    width = {}
    for cuped in (False, True):
        covariate = {name: histories[x] for name, x in rows.items()} if cuped else None
        entry = compare_sums(SHORT_VIDEO, sums, "production", False, covariate)["ab_test"]["oracle"]
        width[cuped] = {metric: np.ptp(x["ci95"]) for metric, x in entry.items() if x["ci95"] is not None}
    assert 0.9 < width[True]["watch_time"] / width[False]["watch_time"] < 0.995
    assert 0.9 < width[True]["long_view"] / width[False]["long_view"] < 0.98


def test_a_test_looked_at_as_users_come(sim, policies, everyone):
    same = {"production": policies["production"], "again": policies["production"]}
    before = simulate._serve._cache_size()
    result = run(sim, same, 505, salt="analyses", always_valid=True)
    assert simulate._serve._cache_size() == before + 1  # one program for all analyses
    analyses = result["interim_analyses"]
    assert [sum(analysis["users"].values()) for analysis in analyses] == [*range(51, 1010, 51), 1010]
    arm = assignment.assign(np.arange(7 * 51), [0.5, 0.5], "analyses")
    rows = {name: np.flatnonzero(arm == i) for i, name in enumerate(same)}
    test = statistics.ABTest(SHORT_VIDEO, tuple(same), "production", paired=False)
    test.update({name: columns(everyone["production"], x) for name, x in rows.items()})
    assert analyses[6]["users"] == {name: len(x) for name, x in rows.items()}
    expected = test.ratios(sequential.quantile(7 * 51 / 1010))["again"]
    for name in ("ci95", "always_valid95"):
        np.testing.assert_allclose(analyses[6]["ab_test"]["again"]["depth"][name], expected["depth"][name], rtol=1e-3)
    last = result["ab_test"]["again"]["watch_time"]
    assert last == analyses[-1]["ab_test"]["again"]["watch_time"]
    assert last["always_valid95"][0] < last["ci95"][0] < last["ci95"][1] < last["always_valid95"][1]


def test_a_paired_test_has_no_sample_ratio(sim, policies, everyone):
    result = run(sim, policies, USERS)
    assert result.keys() == {"ab_test", "signals", "truncated_pct"}
    expected = {name: columns(sums, slice(None)) for name, sums in everyone.items()}
    expected = compare_sums(SHORT_VIDEO, expected, "production", True)["ab_test"]["oracle"]["watch_time"]
    np.testing.assert_allclose(result["ab_test"]["oracle"]["watch_time"]["ci95"], expected["ci95"])


@pytest.mark.slow
def test_intervals_of_aa_tests_cover_zero_as_often_as_they_say(everyone, histories):
    """Production's users assigned to two arms by 1,000 hashes, so that chance moves a coverage by .007 only."""
    sums = {name: x for name, x in everyone["production"].items() if name not in simulate.NOT_TESTED}
    for covariate in (None, histories):
        result = aa.coverage(SHORT_VIDEO, sums, 1000, covariate)
        assert result["mismatches"] <= 0.01
        for metric in ("watch_time", "depth", "requests", "click", "long_view", "like", "return_rate"):
            assert 0.93 <= result["aa"][metric]["coverage"] <= 0.97, (metric, covariate is not None)


def test_empty_groups_of_a_call_are_served(sim, policies, everyone):
    served = simulate.rollout_user_metrics(
        sim,
        policies["production"],
        KEY,
        Partitioner(),
        user_ids=np.arange(0),
        day=2,
        capacity=USERS,
    )
    lengths = {name: len(x) for name, x in served.items() if name != "exposures"}
    assert lengths == dict.fromkeys((*rollout.user_metrics(SHORT_VIDEO), "user_id"), 0)
    assert served["exposures"].shape == everyone["production"]["exposures"].shape and not served["exposures"].any()


@pytest.mark.parametrize("always_valid", [False, True])
@pytest.mark.parametrize("cuped", [False, True])
@pytest.mark.parametrize("num_users", [1, 2, 3, 5, 40, 400])
def test_empty_groups_add_nothing(sim, everyone, histories, monkeypatch, num_users, cuped, always_valid):
    """Whatever blocks users come in, an arm gets none of some: the result is that of all users at once."""
    exposures = np.ones((rollout.EXPOSURE_GROUPS, 5), np.int32)

    def rollout_user_metrics(sim, policy, *_, user_ids, **__):
        sums = {name: x[user_ids] for name, x in everyone[policy].items() if name != "exposures"}
        return sums | {"exposures": exposures * len(user_ids)}

    monkeypatch.setattr(simulate, "rollout_user_metrics", rollout_user_metrics)
    monkeypatch.setattr(rankers, "choices", dict)  # names stand for policies
    monkeypatch.setattr(simulate, "history_means", lambda sim, key, ids, *_: histories[ids])
    names, done = {name: name for name in everyone}, []
    options = {"salt": "empty 19", "cuped": cuped, "always_valid": always_valid, "progress": done.append}
    arm = assignment.assign(np.arange(2 * num_users), [0.5, 0.5], "empty 19")
    rows = {name: np.flatnonzero(arm == i) for i, name in enumerate(names)}
    if min(map(len, rows.values())) < 2:
        with pytest.raises(ValueError, match=r"arm '(production|oracle)' has [01] users, and needs at least 2; use mo"):
            run(sim, names, num_users, **options)
        assert not done  # said before anybody is served
        return
    result = run(sim, names, num_users, **options)
    assert json.loads(json.dumps(result, allow_nan=False)) == result and summary.describe(result)
    assert result["sample_ratio_mismatch"]["users"] == {name: len(x) for name, x in rows.items()}
    if always_valid:
        assert (
            result["interim_analyses"][-1]["users"] == result["sample_ratio_mismatch"]["users"]
            and len(result["interim_analyses"]) <= 20
        )
    expected = compare_sums(
        SHORT_VIDEO,
        {name: columns(everyone[name], x) for name, x in rows.items()},
        "production",
        False,
        {name: histories[x] for name, x in rows.items()} if cuped else None,
    )["ab_test"]["oracle"]
    for metric, entry in expected.items():
        found = result["ab_test"]["oracle"][metric]
        assert found.get("note") == entry.get("note") and (found["ci95"] is None) == (entry["ci95"] is None)
        numbers = [[x["mean"], *(x["ci95"] or [])] for x in (found, entry)]
        np.testing.assert_allclose(*numbers, rtol=1e-6, atol=1e-6)
