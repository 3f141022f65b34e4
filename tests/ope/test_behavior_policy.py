"""The behaviour model finds how slates were made, says so honestly, and never saw the user it speaks of."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax import types
from mmrf_jax.data.session_log import Sessions
from mmrf_jax.ope import behavior_policy, propensity
from mmrf_jax.signals import SHORT_VIDEO

VIDEOS, CANDIDATES, SLATE, HISTORY = 60, 12, 2, 3


def make_items(seed=0):
    rng = np.random.default_rng(seed)
    return types.Items(
        author=jnp.asarray(rng.integers(0, 9, VIDEOS)),
        tag=jnp.asarray(rng.integers(0, 4, VIDEOS)),
        duration=jnp.asarray(rng.uniform(5, 60, VIDEOS), jnp.float32),
        features=jnp.asarray(rng.normal(size=(VIDEOS, 3)), jnp.float32),
        embedding_id=jnp.arange(VIDEOS),
        num_embeddings=VIDEOS,
        num_authors=9,
        num_tags=4,
    )


def true_scores(items, candidates):
    """What the ranker of the logs sees: two features and the duration, not linearly."""
    features, seconds = np.asarray(items.features)[candidates], np.asarray(items.duration)[candidates]
    return 1.5 * features[..., 0] - 1.2 * np.abs(features[..., 1]) + 0.02 * seconds


def make_log(items, requests, seed=0, users=None, scores=true_scores, days=1):
    """Sessions of one request, `SLATE` videos of Plackett–Luce."""
    rng = np.random.default_rng(seed)
    candidates = rng.random((requests, VIDEOS)).argsort(1)[:, :CANDIDATES].astype(np.int32)
    noisy = scores(items, candidates) + rng.gumbel(size=candidates.shape)
    slate = np.argsort(-noisy, axis=1)[:, :SLATE].astype(np.int32)
    slate[rng.random(requests) < 0.3, 1] = -1
    never = np.zeros(requests, bool)
    return Sessions(
        user_id=np.arange(requests, dtype=np.int32) % (users or requests),
        date=20220504 + np.sort(rng.integers(0, days, requests)).astype(np.int32),
        profile=np.zeros((requests, 1), np.float32),
        history_videos=rng.integers(0, VIDEOS, (requests, HISTORY)).astype(np.int32),
        history_feedback=rng.integers(0, 2, (requests, HISTORY, len(SHORT_VIDEO))).astype(np.float32),
        history_mask=rng.random((requests, HISTORY)) < 0.8,
        terminated=never,
        truncated=~never,
        offsets=np.arange(requests + 1, dtype=np.int64),
        context=np.zeros((requests, 1), np.float32),
        candidates=candidates,
        slate=slate,
        feedback=rng.integers(0, 2, (requests, SLATE, len(SHORT_VIDEO))).astype(np.float32),
        log_propensity=np.full(requests, np.nan, np.float32),
        scores=None,
    )


def test_it_finds_the_propensities_that_made_the_log():
    items = make_items()
    log = make_log(items, 6_000, days=2)
    got, report = behavior_policy.log_propensities(log, items, SHORT_VIDEO, [])
    truth = propensity.log_prob(true_scores(items, log.candidates), log.slate)
    shown = log.slate >= 0
    assert (got[~shown] == 0).all() and (got[shown] < 0).all()
    assert np.corrcoef(got[shown], truth[shown])[0, 1] > 0.97
    entropy, uniform = -truth[shown].mean(), report["nats_uniform"]
    assert report["nats"] == pytest.approx(-got[shown].mean())
    assert uniform - report["nats"] > 0.95 * (uniform - entropy) > 0.3
    assert report["requests_fitted"] == 6_000 and report["random"] < 0.03
    deciles = report["by_decile"]
    assert sum(d["rows"] for d in deciles) == CANDIDATES * 6_000 + (CANDIDATES - 1) * shown[:, 1].sum()
    for d in deciles:
        noise = np.sqrt(d["actual"] * (1 - d["actual"]) / d["rows"])
        assert abs(d["predicted"] - d["actual"]) < 4 * noise + 0.05 * d["actual"]


def test_a_log_at_random_has_uniform_propensities():
    items = make_items()
    log = make_log(items, 3_000, scores=lambda items, candidates: np.zeros(candidates.shape))
    got, report = behavior_policy.log_propensities(log, items, SHORT_VIDEO, [])
    assert np.exp(got[:, 0]) == pytest.approx(1 / CANDIDATES, abs=0.05)
    assert report["nats"] == pytest.approx(report["nats_uniform"], abs=0.02)


def test_a_user_is_judged_by_a_model_that_never_saw_the_user():
    """Whatever the user had been shown, the propensities of all that could have been shown add up to 1."""
    items = make_items()
    log = make_log(items, 40, users=4)
    own = np.flatnonzero(log.user_id == 2)
    total = 0.0
    for position in range(CANDIDATES):
        slate = log.slate.copy()
        slate[own] = [position, -1]
        shown = dataclasses.replace(log, slate=slate)
        total += np.exp(behavior_policy.log_propensities(shown, items, SHORT_VIDEO, [], folds=2)[0][own, 0])
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)


def test_calibration_by_hand():
    """Three candidates with odds 1, 2, 5, half of the slots at random; the second slot chooses among two."""
    scores, slate = np.log([[1.0, 2.0, 5.0]]), np.array([[2, 0]])
    half = np.array([0.5])
    got = np.exp(behavior_policy.log_prob(scores, slate, half))
    np.testing.assert_allclose(got, [[0.5 * 5 / 8 + 0.5 / 3, 0.5 / 3 + 0.5 / 2]])
    report = behavior_policy.calibration(scores, slate, half)
    assert report["nats"] == pytest.approx(-np.log(got).mean())
    assert report["nats_uniform"] == pytest.approx((np.log(3) + np.log(2)) / 2)
    assert sum(d["rows"] for d in report["by_decile"]) == 5
    assert sum(d["rows"] * d["predicted"] for d in report["by_decile"]) == pytest.approx(2)
    assert sum(d["rows"] * d["actual"] for d in report["by_decile"]) == pytest.approx(2)
    table = behavior_policy.format_calibration(report | {"random": 0.5})
    # The two smallest propensities, (1/2)(1/8) + (1/2)(1/3) and (1/2)(2/8) + (1/2)(1/3), share the first bin.
    assert table.splitlines()[2] == "| 1 | 0.26042 | 0.00000 | 0.000 |" and "50.00 %" in table


@pytest.mark.parametrize("folds", [1, 4])
def test_refuses_folds_that_cannot_be(folds):
    items = make_items()
    with pytest.raises(ValueError, match=f"{folds} folds of 3 users; use at least 2"):
        behavior_policy.log_propensities(make_log(items, 9, users=3), items, SHORT_VIDEO, [], folds=folds)
