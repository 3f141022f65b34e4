"""Long-running A/B tests: who comes on which day, effects by day and as a whole, on one device and on several."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mmrf_jax.abtest import simulate, simulate_days, summary
from mmrf_jax.envs import rankers, rollout
from mmrf_jax.envs.short_video import env, parameters, reference_policies
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.report import plots
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import configs, simulator_source

CONFIG = parameters.WorldConfig(num_videos=3000, candidates=20, slate=3, history=8, max_requests=12)
USERS, FIRST, DAYS = 800, 3, 6
KEY = jax.random.key(8)


@pytest.fixture(scope="module")
def sim():
    return env.make_world(CONFIG)


@pytest.fixture(scope="module")
def policies():
    return {
        "production": rankers.PrivilegedPolicy(reference_policies.production, 1.0),
        "oracle": rankers.PrivilegedPolicy(reference_policies.oracle_planning, 0.0),
    }


def run(sim, policies, users=USERS, days=DAYS, progress=lambda done: None, **options):
    design = simulate.Design("production", users, **options)
    return simulate_days.simulate_ab_test_by_day(
        sim, policies, KEY, Partitioner(), design, first_day=FIRST, days=days, progress=progress
    )


@pytest.fixture(scope="module")
def result(sim, policies):
    done = []
    found = run(sim, policies, progress=done.append)
    assert done[-1] == USERS * len(policies) * DAYS and len(done) == len(policies) * DAYS
    return found


@pytest.fixture(scope="module")
def replay(sim, policies):
    """{arm: per day (who came [USERS], sums of all users served alone on that day)}, everybody served every day."""
    days = {}
    for name, policy in policies.items():
        due, days[name] = np.full(USERS, FIRST), []
        for day in range(FIRST, FIRST + DAYS):
            sums = simulate.rollout_user_metrics(sim, policy, KEY, Partitioner(), user_ids=np.arange(USERS), day=day)
            came = due == day
            due = np.where(came, day + sums["next_visit"].astype(int), due)
            days[name].append((came, sums))
    return days


def test_users_come_on_their_days(result, replay):
    assert [row["day"] for row in result["by_day"]] == list(range(FIRST, FIRST + DAYS))
    for name, days in replay.items():
        for row, (came, sums) in zip(result["by_day"], days, strict=True):
            metrics = {metric: entry["mean"] for metric, entry in row["ab_test"][name].items()}
            assert row["visitors"][name] == came.sum() == round(metrics["visits"] * USERS)
            assert metrics["watch_time"] == pytest.approx(sums["watch_time"][came].mean(), rel=1e-4)
            assert metrics["watch_time_per_day"] == pytest.approx((sums["watch_time"] * came).mean(), rel=1e-4)
            assert metrics["like"] == pytest.approx(sums["like"][came].sum() / sums["depth"][came].sum(), rel=1e-4)
            assert metrics["return_rate"] == pytest.approx((sums["next_visit"][came] == 1).mean())
        # Those whose next visit is tomorrow are there tomorrow.
        back = {name: (days[0][1]["next_visit"] == 1) for name, days in replay.items()}
        assert (replay[name][1][0] == back[name]).all()


def test_the_whole_is_the_sum_of_its_days(result, replay):
    for name, days in replay.items():
        metrics = {metric: entry["mean"] for metric, entry in result["ab_test"][name].items()}
        visits = sum(came.sum() for came, _ in days)
        seconds = sum(sums["watch_time"][came].sum() for came, sums in days)
        assert metrics["visits"] == pytest.approx(visits / USERS / DAYS)
        assert metrics["watch_time"] == pytest.approx(seconds / visits, rel=1e-4)
        assert metrics["watch_time_per_day"] == pytest.approx(seconds / USERS / DAYS, rel=1e-4)
        cut = sum(sums["truncated"][came].sum() for came, sums in days)
        assert result["truncated_pct"][name] == pytest.approx(100 * cut / visits)
        assert {"coverage", "gini", "ild", "click"} <= metrics.keys()


def test_enjoyed_sessions_bring_users_back(result):
    """The first day is everybody's, so visits do not differ; then the arm that is enjoyed more has more of them."""
    days = [row["ab_test"]["oracle"]["visits"] for row in result["by_day"]]
    assert days[0]["diff_pct"] == 0 and days[0]["ci95"] == [0, 0]
    assert all(day["ci95"][0] > 0 for day in days[1:])
    halves = result["novelty_effect"]["oracle"]["visits"]
    early = [row["visitors"] for row in result["by_day"][1:3]]
    expected = 100 * (sum(d["oracle"] for d in early) / sum(d["production"] for d in early) - 1)
    assert halves["early"] == pytest.approx(expected)
    assert halves["ci95"][0] < halves["change"] < halves["ci95"][1]


def test_one_program_serves_all_days(sim, policies, result):
    before = simulate._serve._cache_size()
    run(sim, policies, days=3)
    assert simulate._serve._cache_size() == before


def test_the_same_arm_twice_differs_by_nothing(sim, policies):
    same = {"production": policies["production"], "again": policies["production"]}
    found = run(sim, same, days=3, always_valid=True)
    for row in (found, *found["by_day"]):
        for entry in row["ab_test"]["again"].values():
            if entry["ci95"] is not None:
                np.testing.assert_allclose([entry["diff_pct"], *entry["ci95"]], 0.0, atol=1e-5)
    assert "always_valid95" in found["by_day"][1]["ab_test"]["again"]["depth"] and "sample_ratio_mismatch" not in found


def test_each_user_in_one_arm(sim, policies):
    found = run(sim, policies, USERS // 2, days=4, salt="long", cuped=True, always_valid=True)
    users = found["sample_ratio_mismatch"]["users"]
    assert sum(users.values()) == USERS and found["sample_ratio_mismatch"]["p_value"] > 0.001
    assert found["by_day"][0]["visitors"] == users  # all come on the first day
    entry = found["by_day"][2]["ab_test"]["oracle"]["visits"]
    assert entry["always_valid95"][0] < entry["ci95"][0] < entry["ci95"][1] < entry["always_valid95"][1]
    assert found["novelty_effect"]["production"]["depth"]["ci95"] == [0.0, 0.0]


def rollout_user_metrics(back: dict[str, int]):
    """Instead of `simulate.rollout_user_metrics`: everybody of an arm is back after so many days."""

    def serve(sim, policy, *_, user_ids, **__):
        n = len(user_ids)
        sums = {name: 1.0 + np.arange(n) % 7 for name in rollout.user_metrics(SHORT_VIDEO)} | {"truncated": np.zeros(n)}
        exposures = np.ones((rollout.EXPOSURE_GROUPS, CONFIG.num_videos), np.int32)
        return sums | {"user_id": user_ids, "next_visit": np.full(n, back[policy]), "exposures": exposures}

    return serve


@pytest.mark.parametrize("salt", [None, "empty"])
@pytest.mark.parametrize(
    "back", [{"production": 30, "oracle": 30}, {"production": 30, "oracle": 1}, {"production": 1, "oracle": 30}]
)
def test_empty_groups_of_a_day_add_nothing(sim, monkeypatch, tmp_path, back, salt):
    """Days on which an arm has no visitors: no mean of a session, 0 of a user and day, and every table and picture."""
    monkeypatch.setattr(simulate, "rollout_user_metrics", rollout_user_metrics(back))
    monkeypatch.setattr(rankers, "choices", dict)  # names stand for policies
    found = run(sim, {name: name for name in back}, users=60, salt=salt, always_valid=True)
    users = {"production": 60, "oracle": 60} if salt is None else found["sample_ratio_mismatch"]["users"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for row in found["by_day"][1:]:
        for name, days in back.items():
            assert row["visitors"][name] == (users[name] if days == 1 else 0)
            metrics = row["ab_test"][name]
            assert (metrics["watch_time"]["mean"] is None) == (metrics["like"]["mean"] is None) == (days == 30)
            assert metrics["visits"]["mean"] == (days == 1)
        assert row["ab_test"]["oracle"]["visits"]["ci95"] is None
    sessions = {name: users[name] * (DAYS if days == 1 else 1) for name, days in back.items()}
    for name, metrics in found["ab_test"].items():
        assert metrics["visits"]["mean"] == pytest.approx(sessions[name] / users[name] / DAYS)
    assert found["novelty_effect"]["oracle"]["visits"]["note"].startswith("too few: 0 users of ")
    assert "too few" in summary.describe(found)
    if salt is not None:  # half of them: Matplotlib takes as long as all else
        plots.days(found, tmp_path / "days.png")
        plots.forest(found, tmp_path / "forest.png")


def test_empty_groups_name_an_arm_that_stays_below_two_users(sim, policies):
    with pytest.raises(ValueError, match=r"arm '(production|oracle)' has [01] users, and needs at least 2; use more"):
        run(sim, policies, users=1, salt="long", always_valid=True)


DEVICES = """
import jax, numpy as np
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.abtest import simulate, simulate_days
from mmrf_jax.envs import rankers
from mmrf_jax.envs.short_video import env, parameters, reference_policies

sim = env.make_world(parameters.WorldConfig(num_videos=3000, candidates=20, slate=3, history=4, max_requests=6))
policies = {"production": rankers.PrivilegedPolicy(reference_policies.production, 1.0),
            "random": rankers.PrivilegedPolicy(reference_policies.random, 1.0)}
found = [
    simulate_days.simulate_ab_test_by_day(sim, policies, jax.random.key(0), Partitioner(devices),
                     simulate.Design("production", 101, "devices"), first_day=0, days=3)
    for devices in (jax.devices(), jax.devices()[:1])
]
assert len(jax.devices()) == 4 and found[0]["sample_ratio_mismatch"] == found[1]["sample_ratio_mismatch"]
for row, alone in zip(found[0]["by_day"], found[1]["by_day"], strict=True):
    assert row["visitors"] == alone["visitors"]
    for arm, metrics in row["ab_test"].items():
        for metric, entry in metrics.items():
            other = alone["ab_test"][arm][metric]
            np.testing.assert_allclose(entry["mean"], other["mean"], rtol=1e-4, err_msg=metric)
print("all well")
"""


def test_days_that_a_simulator_does_not_have_are_refused():
    config = configs.override(configs.Run(), ab_test={"day": 50})
    simulator_source.check_days(config, 11)
    with pytest.raises(ValueError, match=r"days 50 to 61 end after day 60, .* at most 11 days"):
        simulator_source.check_days(config, 12)
    config = dataclasses.replace(config, simulator="feedback")
    with pytest.raises(ValueError, match=r"do not say when users come back.*--config.simulator=world"):
        simulator_source.check_days(config, 2)


@pytest.mark.slow
def test_four_devices_run_as_one(run_python):
    assert "all well" in run_python(DEVICES, devices=4)
