"""The study of the estimators: its logs are production's, its truth is what the world would have answered."""

import json

import jax
import ml_collections
import numpy as np
import pytest

from mmrf_jax.envs import collect
from mmrf_jax.ope import estimators, propensity
from mmrf_jax.sweeps import off_policy_study
from mmrf_jax.training import configs, restore

WORLD = {"num_videos": 2_000, "candidates": 20, "slate": 3, "history": 5, "max_requests": 8, "seed": 0}
POLICIES = {"production": ("production", 1.0), "myopic": ("oracle_myopic", 0.5), "uniform": ("random", 1.0)}

NAMES = sorted(POLICIES)  # as a config keeps them


def stochastic_log_prob(scores, slate):
    """Of the stochastic ranker of any method."""
    return propensity.log_prob(propensity.standardised(scores), slate)


def make_config(**fields):
    values = {
        "run": {
            "seed": 0,
            "source": "world",
            "world": WORLD,
            "collect": {"sessions": 1, "test_sessions": 1},
            "data": {"dir": ""},
        },
        "policies": POLICIES,
        "logs": 4,
        "log_users": 60,
        "log_requests": 2,
        "model_sessions": 100,
    }
    return ml_collections.ConfigDict(values | {"sessions": 64} | fields)


@pytest.fixture(scope="module")
def simulated():
    config = make_config()
    source, key = restore.open_source(configs.run_of(config.run.to_dict()), None), jax.random.key(3)
    scores = off_policy_study.rankers_of(source)
    weights = off_policy_study.mixes(config.policies, list(scores))
    model = off_policy_study.fit_reward_model(source, jax.random.key(4), 200)
    return source, key, *off_policy_study.simulate_logs(source, scores, key, weights, 300, 2, model)


@pytest.mark.slow
def test_its_logs_are_those_that_collecting_gives(simulated):
    source, key, rows, _, _ = simulated
    log = collect.collect(
        source.sim,
        source.policies["production"],
        key,
        first_user=off_policy_study._LOG_USERS,
        num_sessions=300,
        day=0,
        keep_scores=True,
    )
    early = np.concatenate([np.arange(a, min(a + 2, b)) for a, b in zip(log.offsets, log.offsets[1:], strict=False)])
    feedback = log.feedback[early].reshape(-1, 9)[:, off_policy_study._COLUMNS]
    np.testing.assert_array_equal(rows["reward"][:, :3], feedback[:, :3])
    np.testing.assert_allclose(rows["reward"][:, 3], feedback[:, 3], rtol=1e-5)  # seconds, by two programs
    user = np.repeat(log.user_id, np.diff(log.offsets))[early] - off_policy_study._LOG_USERS
    np.testing.assert_array_equal(rows["user"], np.repeat(user, 3))
    scores, slate = log.scores[early], log.slate[early]
    ratio = stochastic_log_prob(scores, slate) - propensity.log_prob(scores, slate)
    np.testing.assert_allclose(rows["log_weight"][:, NAMES.index("production")], ratio.ravel(), atol=2e-3)
    left = np.tile(-np.log([20.0, 19.0, 18.0]), len(early))
    uniform = left - propensity.log_prob(scores, slate).ravel()
    np.testing.assert_allclose(rows["log_weight"][:, NAMES.index("uniform")], uniform, atol=2e-3)


@pytest.mark.slow
def test_estimates_hold_its_truth(simulated):
    _, _, rows, truth, _ = simulated
    for i, name in enumerate(NAMES):
        decisions = estimators.LoggedDecisions(rows["user"], rows["log_weight"][:, i], rows["reward"])
        found = estimators.estimate(decisions, off_policy_study.MEASURED)["signals"]
        for j in (0, 3):  # clicks and seconds; the rest is too rare in so small a log
            value, (low, high) = (found[off_policy_study.MEASURED[j]]["ncis"]["inf"][key] for key in ("value", "ci95"))
            assert abs(value - truth[i, j]) < 1.5 * (high - low), (name, off_policy_study.MEASURED[j])
    seconds = dict(zip(NAMES, truth[:, 3], strict=True))
    assert seconds["uniform"] < seconds["production"] < seconds["myopic"]


@pytest.mark.slow
def test_estimates_with_a_model_and_of_slates_hold_their_truths(simulated):
    _, _, rows, truth, slate_truth = simulated
    clicks = off_policy_study.MEASURED.index("click")
    # The model is calibrated on users that it has not seen; weighted predictions are its expectations but for noise.
    assert rows["predicted"][:, clicks].mean() == pytest.approx(rows["reward"][:, clicks].mean(), rel=0.1)
    for i in range(len(NAMES)):
        weighted = np.exp(rows["log_weight"][:, i]) * rows["predicted"][:, clicks] - rows["direct"][:, i, clicks]
        assert abs(weighted.mean()) < 4.0 * weighted.std() / np.sqrt(len(weighted)), NAMES[i]
    for i, name in enumerate(NAMES):
        found = off_policy_study._estimates(rows, i, slice(None), draws=200, seed=0)
        # The weights of whole slates reach the uniform policy in none of 600: sips has an interval, and it is wrong.
        names = {*off_policy_study.WITH_MODEL, *off_policy_study.OF_SLATES} - {
            "dm",
            "sips" if name == "uniform" else "",
        }
        for estimator in sorted(names):
            value, (low, high) = found["click", estimator, "default"]
            true = (slate_truth if estimator in off_policy_study.OF_SLATES else truth)[i, clicks]
            assert abs(value - true) < 1.5 * (high - low), (name, estimator)
    # What is below a slot is nothing for the last one, and a slate's expectation for the one above the first.
    rest, direct = (rows[key].reshape(-1, 3, *rows[key].shape[1:]) for key in ("rest", "direct"))
    assert not rest[:, -1].any() and (rest[:, 0].mean(axis=0)[:, clicks] > rest[:, 1].mean(axis=0)[:, clicks]).all()
    assert direct.shape == rest.shape


def test_the_reward_model_by_hand():
    model = off_policy_study.RewardModel(np.arange(6.0).reshape(2, 3, 1), np.zeros((2, 1)))
    got = model.of_candidates(np.array([[1.0, 2.0]]), np.array([[[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]]]))
    np.testing.assert_allclose(got[0, :, 0], [0.0 - 2.0 + 2.0 * (3.0 - 5.0), 1.0 + 2.0 * 4.0])


def test_summary_by_hand():
    policies = {
        name: {"click": {"truth": t, "on_policy": o}}
        for name, t, o in zip("abcd", (1, 2, 4, 5), (1, 3, 2, 4), strict=True)
    }
    entries = {
        name: {"pooled": p, "coverage": c}
        for name, p, c in zip("abcd", (1.1, 1.8, 4, 6), (1, 0.9, 0.8, 0.9), strict=True)
    }
    got = off_policy_study._summary(entries, policies, "click", ["a", "b"])
    assert got["all"] == pytest.approx({"error": 0.1, "coverage": 0.9, "rank": 1.0, "rank_on_policy": 0.8})
    assert got["close"]["error"] == pytest.approx(0.1) and got["close"]["rank"] is None
    for entry in policies.values():
        entry["click"]["slate_truth"] = 2.0 * entry["click"]["truth"]
    assert off_policy_study._summary(entries, policies, "click", ["a"], "slate_truth")["close"][
        "error"
    ] == pytest.approx(0.45)


@pytest.mark.slow
def test_a_study_writes_its_tables(tmp_path):
    table = off_policy_study.run_error_study(make_config(), tmp_path)
    assert json.loads((tmp_path / "table.json").read_text()) == table
    assert "production" in table["close"] and "uniform" not in table["close"]
    entry = table["estimators"]["watch_time"]["ncis"]["inf"]["uniform"]
    assert 0 <= entry["coverage"] <= 1 and entry["pooled"] == pytest.approx(entry["mean"], rel=0.3)
    earned = {name: x["watch_time"]["on_policy"] for name, x in table["policies"].items()}
    assert earned["uniform"] < earned["myopic"]
    text = (tmp_path / "table.md").read_text()
    assert "4 logs of 60 users, the first 2 requests" in text and "| watch_time | SNIPS | inf |" in text
    assert "| watch_time | Switch-DR | – |" in text and "| watch_time | Cascade-DR | – |" in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policies": {"other": ("random", 1.0)}}, "no policy is named production"),
        ({"policies": POLICIES | {"x": ("no one", 1.0)}}, "policy x has an unknown ranker 'no one'; choose among"),
        ({"log_users": 1}, "config.log_users is 1; use --config.log_users=2"),
    ],
)
def test_refuses_what_cannot_be_compared(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        off_policy_study.run_error_study(make_config(**fields), tmp_path)
