"""Fidelity of predicted feedback against scikit-learn and hand-made arrays; intervals against known differences."""

import itertools
import json

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from mmrf_jax.metrics import model_quality, ranking
from mmrf_jax.signals import SHORT_VIDEO

CLICK, LIKE, HATE = (SHORT_VIDEO.index(s) for s in ("click", "like", "hate"))
DRAWS = 200


def make_rows(seed: int, users: int = 400, per_user: int = 12):
    """(user_id, feedback, truth {signal: [n]}): clicks of known probability and seconds of known mean, users mixed."""
    rng = np.random.default_rng(seed)
    user_id = rng.permutation(np.repeat(np.arange(users) * 7 + 3, per_user)).astype(np.int32)
    click, seconds = expit(rng.normal(0.0, 1.5, len(user_id))), rng.uniform(2.0, 60.0, len(user_id))
    feedback = np.zeros((len(user_id), len(SHORT_VIDEO)), np.float32)
    feedback[:, CLICK] = rng.random(len(user_id)) < click
    feedback[:, SHORT_VIDEO.index("watch_time")] = seconds * rng.exponential(1.0, len(user_id))
    return user_id, feedback, {"click": click, "watch_time": seconds}


def binary_rows(values, labels, users=None):
    """Metrics of one ranker's clicks."""
    feedback = np.zeros((len(values), len(SHORT_VIDEO)), np.float32)
    feedback[:, CLICK] = labels
    users = np.arange(len(values)) if users is None else users
    result = model_quality.metrics(SHORT_VIDEO, users, feedback, {"model": {"click": np.asarray(values)}}, draws=DRAWS)
    return result["click"]["model"]


def assert_same(a, b):
    """Equal nested results, numbers to rounding."""
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == (b if b is None else pytest.approx(b, rel=1e-9))


def test_binary_figures_equal_sklearn():
    user_id, feedback, truth = make_rows(0)
    prediction = np.round(truth["click"], 2)  # with ties
    prediction = prediction.clip(0.01, 0.99).astype(np.float32)
    result = model_quality.metrics(SHORT_VIDEO, user_id, feedback, {"model": {"click": prediction}}, draws=DRAWS)
    assert list(result) == ["click"]
    entry, label = result["click"]["model"], feedback[:, CLICK]
    assert entry["logloss"] == pytest.approx(log_loss(label, prediction.astype(np.float64)), rel=1e-9)
    assert entry["auc"] == pytest.approx(roc_auc_score(label, prediction), rel=1e-12)
    grouped = ranking.grouped_auc(user_id, prediction, {"click": label})["click"]
    assert entry["gauc"] == grouped.value and entry["eligible_users"] == grouped.eligible_users > 200
    interval = ranking.bootstrap_interval(grouped.per_user, grouped.impressions, DRAWS)
    assert entry["gauc_ci95"] == [interval.low, interval.high]
    assert "model_minus" not in entry


def test_log_loss_ece_and_deciles_by_hand():
    entry = binary_rows([0.2, 0.9, 0.2, 0.9, 0.9], [0, 1, 1, 1, 1])
    expected = -(np.log(0.8) + np.log(0.9) + np.log(0.2) + 2 * np.log(0.9)) / 5
    assert entry["logloss"] == pytest.approx(expected, rel=1e-12)
    assert [b["rows"] for b in entry["by_decile"]] == [2, 3]
    assert [b["predicted"] for b in entry["by_decile"]] == pytest.approx([0.2, 0.9])
    assert [b["actual"] for b in entry["by_decile"]] == [0.5, 1.0]
    assert entry["ece"] == pytest.approx(0.4 * 0.3 + 0.6 * 0.1)


def test_probabilities_of_zero_and_one_are_clipped():
    entry = binary_rows([0.0, 1.0], [1, 1])
    assert entry["logloss"] == pytest.approx((-np.log(1e-7) - np.log1p(-1e-7)) / 2, rel=1e-9)


def test_deciles_are_of_equal_mass_and_keep_ties_together():
    distinct = binary_rows(np.linspace(0.0, 1.0, 1000) ** 3, np.zeros(1000))["by_decile"]
    assert len(distinct) == 10 and all(abs(b["rows"] - 100) <= 1 for b in distinct)
    assert all(a["predicted"] < b["predicted"] for a, b in itertools.pairwise(distinct))
    # 55 of 100 rows are equal, the first and the last in the order of rows among them.
    tied = np.concatenate([np.full(30, 0.3), np.linspace(0.4, 0.9, 45), np.full(25, 0.3)])
    bins = binary_rows(tied, np.zeros(100))["by_decile"]
    assert bins[0]["predicted"] == pytest.approx(0.3) and bins[0]["rows"] == 55
    assert sum(b["rows"] for b in bins) == 100 and len(bins) == 6


def test_calibrated_and_inverted_predictions():
    user_id, feedback, truth = make_rows(1, users=1500)
    rankers = {"true": truth, "inverted": {"click": 1.0 - truth["click"]}}
    result = model_quality.metrics(SHORT_VIDEO, user_id, feedback, rankers, draws=DRAWS)["click"]
    assert result["true"]["ece"] < 0.02 < 0.3 < result["inverted"]["ece"]
    assert len(result["true"]["by_decile"]) == 10
    assert all(abs(b["predicted"] - b["actual"]) < 0.05 for b in result["true"]["by_decile"])
    assert result["true"]["auc"] > 0.7 and result["inverted"]["auc"] == pytest.approx(1.0 - result["true"]["auc"])


def test_constant_predictions_share_one_bin():
    user_id, feedback, _ = make_rows(2)
    n, rate = len(user_id), feedback[:, CLICK].mean(dtype=np.float64)
    constant = {"click": np.full(n, 0.25, np.float32), "watch_time": np.full(n, 9.0)}
    result = model_quality.metrics(SHORT_VIDEO, user_id, feedback, {"constant": constant}, draws=DRAWS)
    click, seconds = result["click"]["constant"], result["watch_time"]["constant"]
    assert click["by_decile"] == [{"predicted": 0.25, "actual": pytest.approx(rate), "rows": n}]
    assert click["ece"] == pytest.approx(abs(rate - 0.25))
    assert click["auc"] == click["gauc"] == seconds["xauc"] == 0.5
    assert [b["rows"] for b in seconds["by_decile"]] == [n]


def test_watch_time_by_hand_and_as_xauc():
    user_id, feedback, truth = make_rows(3)
    target = feedback[:, SHORT_VIDEO.index("watch_time")].astype(np.float64)
    entry = model_quality.metrics(SHORT_VIDEO, user_id, feedback, {"model": truth}, draws=DRAWS)["watch_time"]["model"]
    grouped = ranking.grouped_xauc(user_id, truth["watch_time"], target)
    assert entry["xauc"] == grouped.value > 0.55 and entry["eligible_users"] == 400
    interval = ranking.bootstrap_interval(grouped.per_user, grouped.impressions, DRAWS)
    assert entry["xauc_ci95"] == [interval.low, interval.high]
    assert entry["mae"] == pytest.approx(np.abs(truth["watch_time"] - target).mean(), rel=1e-12)
    assert entry["rmse"] == pytest.approx(np.sqrt(((truth["watch_time"] - target) ** 2).mean()), rel=1e-12)
    assert len(entry["by_decile"]) == 10 and sum(b["rows"] for b in entry["by_decile"]) == len(user_id)
    assert all(abs(b["actual"] / b["predicted"] - 1.0) < 0.25 for b in entry["by_decile"])
    assert "by_duration" not in entry


def test_watch_time_within_deciles_of_duration():
    """Ranking by the duration tells apart the videos of all lengths, and nothing among videos of one length."""
    rng = np.random.default_rng(4)
    user_id = np.repeat(np.arange(300), 40)
    duration = rng.choice(np.arange(10.0, 110.0, 10.0), len(user_id))
    feedback = np.zeros((len(user_id), len(SHORT_VIDEO)), np.float32)
    feedback[:, SHORT_VIDEO.index("watch_time")] = duration * rng.uniform(0.5, 1.0, len(user_id))
    rankers = {"duration": {"watch_time": duration}}
    entry = model_quality.metrics(SHORT_VIDEO, user_id, feedback, rankers, duration, draws=DRAWS)["watch_time"][
        "duration"
    ]
    assert entry["xauc"] > 0.8
    single = [part for part in entry["by_duration"] if part["rows"] < 0.15 * len(user_id)]
    assert len(single) >= 5 and all(part["xauc"] == 0.5 and part["eligible_users"] >= 200 for part in single)
    for i, part in enumerate(entry["by_duration"]):
        low, high = part["duration"]
        rows = (duration <= high) & ((duration > low) | (i == 0))
        assert part["rows"] == rows.sum()
        assert part["predicted"] == pytest.approx(duration[rows].mean())
        assert part["actual"] == pytest.approx(feedback[rows, SHORT_VIDEO.index("watch_time")].mean(dtype=np.float64))


def test_the_order_of_rows_does_not_matter():
    user_id, feedback, truth = make_rows(5)
    duration = np.round(truth["watch_time"])
    noisy = {"click": np.round(truth["click"], 1), "watch_time": np.round(truth["watch_time"], -1)}
    order = np.random.default_rng(0).permutation(len(user_id))

    def shuffle(signals):
        return {signal: values[order] for signal, values in signals.items()}

    a = model_quality.metrics(SHORT_VIDEO, user_id, feedback, {"model": truth, "noisy": noisy}, duration, draws=DRAWS)
    rankers = {"model": shuffle(truth), "noisy": shuffle(noisy)}
    b = model_quality.metrics(SHORT_VIDEO, user_id[order], feedback[order], rankers, duration[order], draws=DRAWS)
    assert a["watch_time"]["noisy"]["model_minus"]["mae"]["ci95"][0] < 0
    assert_same(a, b)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_label_of_one_class_has_no_ranking_figure(value):
    user_id, feedback, truth = make_rows(6)
    feedback[:, LIKE] = value
    rankers = {"model": {"like": truth["click"]}, "half": {"like": np.full(len(user_id), 0.5)}}
    result = model_quality.metrics(SHORT_VIDEO, user_id, feedback, rankers, draws=DRAWS)["like"]
    entry = result["half"]
    assert entry["auc"] is None and entry["gauc"] is None and entry["gauc_ci95"] is None
    assert entry["eligible_users"] == 0 and entry["logloss"] == pytest.approx(np.log(2.0))
    assert entry["ece"] == pytest.approx(0.5)
    minus = entry["model_minus"]
    assert minus["gauc"] == {"diff": None, "ci95": None}
    assert minus["logloss"]["diff"] == pytest.approx(result["model"]["logloss"] - np.log(2.0))
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(("users", "given"), [(199, False), (200, True)])
def test_too_few_users_get_no_ranking_figure_and_no_interval(users, given):
    user_id = np.repeat(np.arange(users), 4)
    feedback = np.zeros((len(user_id), len(SHORT_VIDEO)), np.float32)
    feedback[::4, CLICK] = 1.0
    feedback[:, SHORT_VIDEO.index("watch_time")] = np.tile([1.0, 2.0, 3.0, 4.0], users)
    values = np.random.default_rng(0).random(len(user_id))
    model, other = {"click": values, "watch_time": 9 * values}, {"click": values**2, "watch_time": values}
    duration = np.ones(len(user_id))
    result = model_quality.metrics(
        SHORT_VIDEO, user_id, feedback, {"model": model, "other": other}, duration, draws=DRAWS
    )
    click, seconds = result["click"]["other"], result["watch_time"]["other"]
    figures = [click["auc"], click["gauc"], click["gauc_ci95"], seconds["xauc"], seconds["xauc_ci95"]]
    figures.append(seconds["by_duration"][0]["xauc"])
    for entry, names in ((click, ("gauc", "logloss")), (seconds, ("xauc", "mae"))):
        assert entry["eligible_users"] == users and list(entry["model_minus"]) == list(names)
        figures += [entry["model_minus"][name]["ci95"] for name in names]
        assert entry["model_minus"][names[1]]["diff"] is not None
    assert [figure is not None for figure in figures] == [given] * len(figures)
    assert click["logloss"] > 0 and seconds["mae"] > 0 and seconds["rmse"] > 0
    json.dumps(result, allow_nan=False)


def test_intervals_tell_a_better_model_from_an_equal_one():
    user_id, feedback, truth = make_rows(7)
    rng = np.random.default_rng(1)
    worse = {"click": expit(rng.normal(0, 1.5, len(user_id))), "watch_time": rng.uniform(2.0, 60.0, len(user_id))}

    # Two copies of the truth with noise of the same law: different everywhere, better nowhere.
    def noisy():
        return {
            "click": expit(np.log(truth["click"] / (1 - truth["click"])) + rng.normal(0, 0.3, len(user_id))),
            "watch_time": truth["watch_time"] * np.exp(rng.normal(0, 0.1, len(user_id))),
        }

    rankers = {"model": noisy(), "equal": noisy(), "worse": worse}
    result = model_quality.metrics(SHORT_VIDEO, user_id, feedback, rankers, draws=DRAWS)
    for signal, rank_metric, loss in (("click", "gauc", "logloss"), ("watch_time", "xauc", "mae")):
        assert "model_minus" not in result[signal]["model"]
        better, equal = (result[signal][ranker]["model_minus"] for ranker in ("worse", "equal"))
        assert better[rank_metric]["ci95"][0] > 0 and better[loss]["ci95"][1] < 0
        for name in (rank_metric, loss):
            low, high = equal[name]["ci95"]
            assert low < 0 < high
            for ranker in ("equal", "worse"):
                diff = result[signal][ranker]["model_minus"][name]
                expected = result[signal]["model"][name] - result[signal][ranker][name]
                assert diff["diff"] == pytest.approx(expected, abs=1e-12)
                assert diff["ci95"][0] < diff["diff"] < diff["ci95"][1]


def test_losses_of_users_with_many_rows_weigh_more():
    """One user with 9 rows and one with 1: the difference is of the mean over rows, not over users."""
    users = np.array([5] * 9 + [2])
    feedback = np.zeros((10, len(SHORT_VIDEO)), np.float32)
    rankers = {"model": {"watch_time": np.zeros(10)}, "other": {"watch_time": np.array([1.0] * 9 + [21.0])}}
    entry = model_quality.metrics(SHORT_VIDEO, users, feedback, rankers, draws=DRAWS)["watch_time"]["other"]
    assert entry["mae"] == pytest.approx(3.0)
    assert entry["model_minus"]["mae"]["diff"] == pytest.approx(-3.0)


def test_signals_that_a_ranker_leaves_out():
    user_id, feedback, truth = make_rows(8)
    only = {"click": truth["click"]}
    result = model_quality.metrics(SHORT_VIDEO, user_id, feedback, {"model": only, "other": truth}, draws=DRAWS)
    assert {signal: list(rankers) for signal, rankers in result.items()} == {
        "click": ["model", "other"],
        "watch_time": ["other"],
    }
    assert "model_minus" in result["click"]["other"] and "model_minus" not in result["watch_time"]["other"]
    assert model_quality.metrics(SHORT_VIDEO, user_id, feedback, {}) == {}


def test_wrong_input_is_refused():
    user_id, feedback, truth = make_rows(9, users=20)
    with pytest.raises(ValueError, match="feedback has shape"):
        model_quality.metrics(SHORT_VIDEO, user_id, feedback[:, :-1], {"model": truth})
    with pytest.raises(ValueError, match="unknown signal 'clicks'"):
        model_quality.metrics(SHORT_VIDEO, user_id, feedback, {"model": {"clicks": truth["click"]}})
    with pytest.raises(ValueError, match="expected"):
        model_quality.metrics(SHORT_VIDEO, user_id, feedback, {"model": {"click": truth["click"][:-1]}})
    broken = truth["watch_time"].copy()
    broken[3] = np.inf
    with pytest.raises(ValueError, match="watch_time predicted by model"):
        model_quality.metrics(SHORT_VIDEO, user_id, feedback, {"model": {"watch_time": broken}})
    with pytest.raises(ValueError, match="finite"):
        model_quality.ks_distance(np.array([]), np.array([1.0]))


def test_per_video_mean_by_hand():
    feedback = np.zeros((4, len(SHORT_VIDEO)), np.float32)
    feedback[:, CLICK] = [1, 0, 1, 0]
    feedback[:, SHORT_VIDEO.index("watch_time")] = [100.0, 0.0, 20.0, 40.0]
    means = model_quality.per_video_mean(SHORT_VIDEO, np.array([0, 0, 2, 0]), feedback, np.array([2, 1, 0, 2]), 3)
    assert tuple(means) == SHORT_VIDEO.names
    np.testing.assert_allclose(means["click"], [(1 + 10) / 21, 0.5, (1 + 10) / 23, (1 + 10) / 21])
    # Seconds, not log1p of them: the mean over all four exposures is 40 s.
    np.testing.assert_allclose(means["watch_time"], [(20 + 800) / 21, 40.0, (140 + 800) / 23, (20 + 800) / 21])
    np.testing.assert_array_equal(means["like"], 0.0)


def test_linear_baselines_are_scikit_learns():
    rng = np.random.default_rng(10)
    x = (rng.normal(size=(3000, 3)) * [1.0, 100.0, 0.01] + [0.0, 50.0, 2.0]).astype(np.float32)
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    feedback = np.zeros((3000, len(SHORT_VIDEO)), np.float32)
    feedback[:, CLICK] = rng.random(3000) < expit(1.0 + z[:, 0] - 2.0 * z[:, 1])
    feedback[:, HATE] = 1.0
    feedback[:, SHORT_VIDEO.index("watch_time")] = np.maximum(5.0 + 6.0 * z[:, 2] + rng.normal(size=3000), 0.0)
    train, test = slice(0, 2000), slice(2000, None)
    result = model_quality.logistic(SHORT_VIDEO, x[train], feedback[train], {"other": x[train], "test": x[test]})[
        "test"
    ]
    assert set(result) == set(SHORT_VIDEO.names) and {v.shape for v in result.values()} == {(1000,)}
    center, scale = x[train].mean(axis=0, dtype=np.float64), x[train].std(axis=0, dtype=np.float64)
    at_train, at_test = (x[train] - center) / scale, (x[test] - center) / scale
    expected = LogisticRegression(max_iter=1000).fit(at_train, feedback[train, CLICK]).predict_proba(at_test)[:, 1]
    np.testing.assert_allclose(result["click"], expected, atol=1e-4)
    line = LinearRegression().fit(at_train, feedback[train, SHORT_VIDEO.index("watch_time")]).predict(at_test)
    assert line.min() < 0.0 == result["watch_time"].min()
    np.testing.assert_allclose(result["watch_time"], np.maximum(line, 0.0), atol=1e-3)
    np.testing.assert_allclose(result["like"], 1 / 2002)
    np.testing.assert_allclose(result["hate"], 2001 / 2002)


def test_linear_baselines_fit_on_a_seeded_sample(monkeypatch):
    _, feedback, truth = make_rows(11)
    x = np.stack([truth["click"], truth["watch_time"]], axis=1)
    full = model_quality.logistic(SHORT_VIDEO, x, feedback, {"test": x[:50]})["test"]
    monkeypatch.setattr(model_quality, "_MAX_ROWS", 500)
    first, again, other = (
        model_quality.logistic(SHORT_VIDEO, x, feedback, {"test": x[:50]}, seed)["test"] for seed in (0, 0, 1)
    )
    for signal in ("click", "watch_time"):
        np.testing.assert_array_equal(first[signal], again[signal])
        assert np.abs(first[signal] - other[signal]).max() > 0 and np.abs(first[signal] - full[signal]).max() > 0


def test_ks_distance_by_hand():
    # At 2 the first has all its mass and the second a quarter.
    assert model_quality.ks_distance(np.array([1.0, 2.0]), np.array([2.0, 3.0, 4.0, 5.0])) == pytest.approx(0.75)
    a = np.random.default_rng(0).normal(size=300)
    assert model_quality.ks_distance(a, a[::-1]) == 0.0
    assert model_quality.ks_distance(a, a + 100.0) == 1.0


def test_excess_log_loss_by_hand():
    uncertainty, predicted, label = np.array([2.0, 1.0, 2.0, 1.0]), np.array([0.5, 0.9, 0.2, 0.9]), [1, 1, 1, 1]
    low, high = model_quality.excess_logloss_by_decile(uncertainty, predicted, np.array(label))

    def entropy(p):
        return -p * np.log(p) - (1 - p) * np.log(1 - p)

    assert (low["uncertainty"], low["rows"], high["uncertainty"], high["rows"]) == (1.0, 2, 2.0, 2)
    assert low["logloss"] == pytest.approx(-np.log(0.9)) and low["expected"] == pytest.approx(entropy(0.9))
    assert low["excess"] == pytest.approx(-np.log(0.9) - entropy(0.9))
    assert high["logloss"] == pytest.approx(-(np.log(0.5) + np.log(0.2)) / 2)
    assert high["expected"] == pytest.approx((entropy(0.5) + entropy(0.2)) / 2)
    assert high["excess"] == pytest.approx(high["logloss"] - high["expected"])


def test_excess_log_loss_grows_where_the_prediction_is_off():
    rng = np.random.default_rng(12)
    uncertainty, logit = rng.random(20_000), rng.normal(size=20_000)
    label = rng.random(20_000) < expit(logit)
    true = model_quality.excess_logloss_by_decile(uncertainty, expit(logit), label)
    wrong = model_quality.excess_logloss_by_decile(uncertainty, expit(logit * (1 + 3 * uncertainty)), label)
    assert len(true) == len(wrong) == 10 and all(abs(part["excess"]) < 0.05 for part in true)
    assert wrong[-1]["excess"] > 0.3 > wrong[0]["excess"] + 0.2


def test_uncertainty_ranks():
    rng = np.random.default_rng(13)
    predicted, error = rng.random(2000), rng.random(2000)
    ranks = model_quality.uncertainty_ranks(error**3, predicted, predicted + error)
    assert ranks["spearman"] == pytest.approx(1.0) and ranks["within_deciles"] == pytest.approx(1.0)
    assert abs(ranks["spearman_of_prediction"]) < 0.1
    # An uncertainty that is the prediction in tenths looks good only because errors grow with the prediction.
    tenths = np.floor(10 * predicted)
    ranks = model_quality.uncertainty_ranks(tenths + 0.01 * rng.random(2000), predicted, predicted * (1 + 0.1 * error))
    assert ranks["spearman"] > 0.6 and ranks["spearman_of_prediction"] > 0.6
    assert abs(ranks["within_deciles"]) < 0.3


def test_cold_auc_is_scikit_learn_s():
    rng = np.random.default_rng(17)
    exposures = rng.integers(0, 12, 3000)
    uncertainty = np.round(rng.random(3000) + 0.3 * (exposures < 5), 1)  # many ties
    auc = model_quality.cold_auc(uncertainty, exposures)
    assert auc == pytest.approx(roc_auc_score(exposures < 5, uncertainty), abs=1e-12) and auc > 0.7
    assert model_quality.cold_auc(np.array([0.3, 0.2, 0.1]), np.array([4, 5, 9])) == 1.0
    for number in (4, 5):
        assert model_quality.cold_auc(uncertainty, np.full(3000, number)) is None


def test_uncertainty_ranks_by_hand():
    # Predictions 0.1 (12 rows, ranked rightly), 0.5 (24 rows, the wrong way round) and 0.9 (9 rows: too few).
    predicted = np.repeat([0.1, 0.5, 0.9], [12, 24, 9])
    error = np.concatenate([np.arange(12), np.arange(24), np.arange(9)]) / 100
    uncertainty = np.concatenate([np.arange(12), -np.arange(24), np.arange(9)])
    ranks = model_quality.uncertainty_ranks(uncertainty, predicted, predicted - error)
    assert ranks["within_deciles"] == pytest.approx((12 - 24) / 36)
    # A constant uncertainty ranks nothing; a decile where it is constant is left out.
    flat = model_quality.uncertainty_ranks(np.ones(45), predicted, predicted - error)
    assert flat["spearman"] is None and flat["within_deciles"] is None and flat["spearman_of_prediction"] is not None
    uncertainty[12:36] = 3
    assert model_quality.uncertainty_ranks(uncertainty, predicted, predicted - error)[
        "within_deciles"
    ] == pytest.approx(1)


def test_predictions_of_unseen_videos_by_hand():
    """Two predictions of two videos each, in four groups with a sure label of each kind."""
    predicted = np.tile([0.2, 0.8], 4)
    probability = np.tile([0.0, 1.0], 4)
    found = model_quality.of_unseen(np.repeat(np.arange(4), 2), predicted, probability)
    assert found == {"ece": pytest.approx(0.2), "logloss": pytest.approx(-np.log(0.8)), "gauc": 1.0}
    # Labels of probability 1/2 enter in expectation, and one group with equal labels ranks nothing.
    half = model_quality.of_unseen(np.zeros(2, int), np.array([0.5, 0.5]), np.array([0.5, 0.5]))
    assert half["ece"] == 0.0 and half["logloss"] == pytest.approx(np.log(2.0))
    assert model_quality.of_unseen(np.zeros(2, int), np.array([0.5, 0.9]), np.ones(2))["gauc"] is None


def test_selection_bias_by_hand():
    predicted, truth = np.array([0.5, 0.5, 0.5, 0.5]), np.array([0.4, 0.8, 0.1, 0.5])
    shown = np.array([True, False, False, True])
    bias = model_quality.selection_bias(predicted, truth, shown)
    assert bias == {
        "impressions": pytest.approx(0.05),
        "non_impressions": pytest.approx(0.35),
        "ratio": pytest.approx(7),
    }
    everything = model_quality.selection_bias(predicted, truth, np.ones(4, bool))
    assert everything == {"impressions": pytest.approx(0.2), "non_impressions": None, "ratio": None}
    nothing = model_quality.selection_bias(predicted, truth, np.zeros(4, bool))
    assert nothing == {"impressions": None, "non_impressions": pytest.approx(0.2), "ratio": None}
    assert model_quality.selection_bias(truth, truth, shown)["ratio"] is None  # no error to divide by


def test_table():
    user_id, feedback, truth = make_rows(14)
    feedback[0, LIKE] = 1.0
    half = np.full(len(user_id), 0.5)
    rankers = {"model": truth | {"like": half}, "half": {"click": half, "like": half, "watch_time": 60 * half}}
    result = model_quality.metrics(SHORT_VIDEO, user_id, feedback, rankers, draws=DRAWS)
    lines = model_quality.format_model_quality(result).split("\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in cells} == {8}
    assert [row[:2] for row in cells[2:]] == [[s, r] for s in ("click", "like", "watch_time") for r in rankers]
    click, like, seconds = cells[3], cells[5], cells[7]
    low, high = result["click"]["half"]["model_minus"]["logloss"]["ci95"]
    assert click[3:6] == ["0.5000", "0.6931", f"{result['click']['half']['ece']:.4f}"]
    assert click[7] == f"[{low:+.4f}, {high:+.4f}]"
    assert like[2:4] == ["1", "too few"] and like[6] == "–" and like[7] == "[+0.0000, +0.0000]"
    assert seconds[4:6] == [f"{result['watch_time']['half'][k]:.4f}" for k in ("mae", "rmse")]
    assert cells[2][6:] == ["–", "–"]
