"""GAUC against scikit-learn user by user, XAUC against a loop over pairs, bootstrap against known errors."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mmrf_jax.metrics import ranking


def _impressions(seed: int, rows: int = 600, users: int = 40):
    """Random rows with ties, users with one row and users with one class; the ids are large and not in order."""
    rng = np.random.default_rng(seed)
    groups = np.concatenate([rng.integers(0, users, rows), [users, users + 1, users + 1]]) * 1_000_003 - 7
    scores = rng.integers(0, 8, len(groups)) / 4.0
    targets = np.round(rng.lognormal(1.5, 1.0, len(groups)))
    labels = {"often": rng.random(len(groups)) < 0.5, "rare": rng.random(len(groups)) < 0.05}
    labels["often"][groups == groups[0]] = True
    return groups, scores, targets, labels


def _loop_xauc(scores, targets):
    wins, pairs = 0.0, 0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if targets[i] > targets[j]:
                pairs += 1
                wins += 1.0 if scores[i] > scores[j] else 0.5 * (scores[i] == scores[j])
    return wins, pairs


@pytest.mark.parametrize("seed", range(3))
def test_gauc_equals_sklearn_user_by_user(seed):
    groups, scores, _, labels = _impressions(seed)
    results = ranking.grouped_auc(groups, scores, labels)
    assert list(results) == ["often", "rare"]
    for name, result in results.items():
        expected = {}
        for user in np.unique(groups):
            rows = groups == user
            if 0 < labels[name][rows].sum() < rows.sum():
                expected[user] = (roc_auc_score(labels[name][rows], scores[rows]), rows.sum())
        aucs, weights = np.array(list(expected.values())).T
        np.testing.assert_array_equal(result.users, list(expected))
        np.testing.assert_allclose(result.per_user, aucs, rtol=1e-12)
        np.testing.assert_array_equal(result.impressions, weights)
        assert result.eligible_users == len(expected)
        assert result.value == pytest.approx(np.average(aucs, weights=weights), rel=1e-12)


def test_gauc_by_hand():
    # User 5: scores 3 > 2 = 2 > 1 with labels 1, 1, 0, 0: (1 + 1 + .5 + 1) / 4. User 2 the wrong way round. User 9 has
    # one class.
    groups = np.array([5, 2, 5, 9, 5, 2, 5, 9])
    scores = np.array([3.0, 0.1, 2.0, 1.0, 2.0, 0.9, 1.0, 2.0])
    label = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    result = ranking.grouped_auc(groups, scores, {"like": label})["like"]
    np.testing.assert_array_equal(result.users, [2, 5])
    np.testing.assert_allclose(result.per_user, [0.0, 0.875])
    assert result.value == pytest.approx((2 * 0.0 + 4 * 0.875) / 6)


def test_labels_as_columns_and_infinite_scores():
    groups, scores, _, labels = _impressions(0)
    scores = np.where(scores == 0, -np.inf, scores)
    named = ranking.grouped_auc(groups, scores, labels)
    columns = ranking.grouped_auc(groups, scores, np.stack([labels["often"], labels["rare"]], 1).astype(np.float32))
    assert [columns[i].value for i in (0, 1)] == [named[name].value for name in ("often", "rare")]
    assert ranking.grouped_auc(groups, scores, labels["rare"])[0].value == named["rare"].value


def test_nobody_is_eligible():
    result = ranking.grouped_auc(np.array([1, 2]), np.array([0.0, 1.0]), {"like": np.array([0, 1])})["like"]
    assert np.isnan(result.value) and result.eligible_users == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk", [1, 50, 1 << 18])
def test_xauc_equals_a_loop_over_pairs(seed, chunk, monkeypatch):
    monkeypatch.setattr(ranking, "_CHUNK_ROWS", chunk)
    groups, scores, targets, _ = _impressions(seed, rows=400, users=12)
    result = ranking.grouped_xauc(groups, scores, targets)
    expected = {user: _loop_xauc(scores[groups == user], targets[groups == user]) for user in np.unique(groups)}
    expected = {user: wins / pairs for user, (wins, pairs) in expected.items() if pairs}
    np.testing.assert_array_equal(result.users, list(expected))
    np.testing.assert_allclose(result.per_user, list(expected.values()), rtol=1e-12)
    weights = [(groups == user).sum() for user in expected]
    np.testing.assert_array_equal(result.impressions, weights)
    assert result.value == pytest.approx(np.average(list(expected.values()), weights=weights), rel=1e-12)


def test_xauc_of_one_user_perfect_reversed_constant_and_without_pairs():
    user, targets = np.zeros(1000, int), np.random.default_rng(0).permutation(1000) // 3
    assert ranking.grouped_xauc(user, targets, targets).value == 1.0
    assert ranking.grouped_xauc(user, -targets, targets).value == 0.0
    assert ranking.grouped_xauc(user, np.zeros(1000), targets).value == 0.5
    assert ranking.grouped_xauc(user, targets, np.ones(1000)).eligible_users == 0


def test_xauc_of_a_binary_target_is_the_auc():
    groups, scores, _, labels = _impressions(4)
    auc = ranking.grouped_auc(groups, scores, labels)["often"]
    xauc = ranking.grouped_xauc(groups, scores, labels["often"])
    np.testing.assert_allclose(xauc.per_user, auc.per_user, rtol=1e-12)
    np.testing.assert_array_equal(xauc.users, auc.users)


def test_order_of_rows_and_monotone_scores_do_not_matter():
    groups, scores, targets, labels = _impressions(5)
    order = np.random.default_rng(0).permutation(len(groups))
    shuffled = {name: label[order] for name, label in labels.items()}
    first = ranking.grouped_auc(groups, scores, labels)["rare"]
    second = ranking.grouped_auc(groups[order], np.exp(scores[order]), shuffled)["rare"]
    assert first.value == second.value
    np.testing.assert_array_equal(first.per_user, second.per_user)
    expected = ranking.grouped_xauc(groups, scores, targets)
    got = ranking.grouped_xauc(groups[order], np.exp(scores[order]), targets[order])
    np.testing.assert_array_equal(got.per_user, expected.per_user)


def test_above_median_by_hand():
    train_users, train_play = np.array([3, 1, 3, 1, 3, 1, 7]), np.array([9.0, 4.0, 1.0, 2.0, 5.0, 30.0, 6.0])
    train_users, train_play = np.append(train_users, 7), np.append(train_play, 8.0)  # medians: 1 → 4, 3 → 5, 7 → 7
    test_users, test_play = (
        np.array([1, 1, 3, 3, 7, 7, 8, 0, 8]),
        np.array([4.0, 5.0, 4.9, 5.1, 7.0, 7.5, 9.0, 1.0, 2.0]),
    )
    label, mask, left_out = ranking.above_median(train_users, train_play, test_users, test_play)
    np.testing.assert_array_equal(mask, [1, 1, 1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(label, [0, 1, 0, 1, 0, 1, 0, 0, 0])
    assert left_out == 2


def test_deciles_take_a_duration_ranker_down_to_chance():
    rng = np.random.default_rng(0)
    users, duration = rng.integers(0, 50, 40_000), rng.uniform(5, 300, 40_000)
    label = rng.random(40_000) < duration / 300  # only the duration matters
    overall = ranking.grouped_auc(users, duration, {"long_view": label})["long_view"].value
    deciles = ranking.by_decile(duration, users, duration, {"long_view": label})
    within = [decile.metric["long_view"].value for decile in deciles]
    assert len(deciles) == 10 and overall > 0.8 and np.mean(within) < 0.58
    assert sum(decile.impressions for decile in deciles) == 40_000
    second = (duration > deciles[1].low) & (duration <= deciles[1].high)
    assert second.sum() == deciles[1].impressions
    expected = ranking.grouped_auc(users[second], duration[second], {"long_view": label[second]})["long_view"].value
    assert within[1] == expected
    xauc = ranking.by_decile(duration, users, duration, duration, ranking.grouped_xauc)
    assert [decile.metric.value for decile in xauc] == [1.0] * 10


def test_deciles_of_equal_durations():
    deciles = ranking.by_decile(np.full(20, 15.0), np.zeros(20, int), np.arange(20), np.arange(20) % 2)
    assert [decile.impressions for decile in deciles] == [20]


@pytest.mark.parametrize("block", [1 << 16, 150])
def test_bootstrap_has_the_width_of_the_normal_interval(block, monkeypatch):
    monkeypatch.setattr(ranking, "_BLOCK_USERS", block)
    rng = np.random.default_rng(3)
    values, weights = rng.normal(0.3, 1.0, 1000), rng.integers(1, 50, 1000)
    interval = ranking.bootstrap_interval(values, weights, draws=4000, seed=1)
    mean = np.average(values, weights=weights)
    error = np.sqrt((weights**2 * (values - mean) ** 2).sum()) / weights.sum()
    assert interval.estimate == pytest.approx(mean)
    assert (interval.high - interval.low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.06)
    assert (interval.high + interval.low) / 2 == pytest.approx(mean, abs=0.15 * error)
    assert interval == ranking.bootstrap_interval(values, weights, draws=4000, seed=1)
    assert interval != ranking.bootstrap_interval(values, weights, draws=4000, seed=2)


def test_paired_bootstrap_sees_a_small_difference_between_users_who_vary():
    rng = np.random.default_rng(0)
    base, weights = rng.uniform(0.3, 0.9, 500), rng.integers(1, 100, 500)
    better = base + 0.004 + rng.normal(0, 0.01, 500)
    paired = ranking.paired_bootstrap(better, base, weights)
    assert 0.0 < paired.low < 0.004 < paired.high
    assert ranking.bootstrap_interval(better, weights).low < ranking.bootstrap_interval(base, weights).high
    assert ranking.paired_bootstrap(base, better, weights).low < 0.0
    assert ranking.paired_bootstrap(base, base, weights) == ranking.Interval(0.0, 0.0, 0.0)


def test_errors_name_the_thing():
    users, scores, label = np.array([1, 1]), np.array([0.0, 1.0]), np.array([0, 1])
    with pytest.raises(ValueError, match="scores has 1 NaN among 2 rows"):
        ranking.grouped_auc(users, np.array([0.0, np.nan]), {"like": label})
    with pytest.raises(ValueError, match=r"label 'like' must be 0 or 1, has values in \[0, 2\]"):
        ranking.grouped_auc(users, scores, {"like": 2 * label})
    with pytest.raises(ValueError, match=r"label 'like' has shape \(3,\), expected \(2,\)"):
        ranking.grouped_auc(users, scores, {"like": np.zeros(3)})
    with pytest.raises(ValueError, match="groups must be integers"):
        ranking.grouped_xauc(users.astype(float), scores, scores)
    with pytest.raises(ValueError, match="same users"):
        ranking.paired_bootstrap(np.ones(3), np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="leave ineligible users out"):
        ranking.bootstrap_interval(np.array([np.nan, 1.0]), np.ones(2))
