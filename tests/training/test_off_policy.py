"""From logs to estimates: units, how propensities are known, and what is refused."""

import dataclasses
import math

import numpy as np
import pytest
import random_logs

from mmrf_jax.data import sessions
from mmrf_jax.ope import propensity
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import off_policy


def scored(seed=0, number=30):
    """A log whose propensities follow from its scores."""
    log = random_logs.make_log(seed, number)
    each = propensity.log_prob(log.scores, log.slate)
    return dataclasses.replace(log, log_propensity=each.sum(axis=1).astype(np.float32)), each


def test_units_agree_with_loops_over_the_log():
    log, _ = scored()
    rng = np.random.default_rng(1)
    weight = np.where(log.slate >= 0, rng.normal(0, 0.4, log.slate.shape), 0.0)
    direct, expected = rng.random((2, *log.feedback.shape))
    units = off_policy.estimate_units(log, SHORT_VIDEO.names, weight, 0.9, expected, direct, draws=20)
    videos = slates = mass = slate_mass = number = doubly = gain = 0.0
    for s in range(log.num_sessions):
        product = 1.0
        for t, r in enumerate(range(log.offsets[s], log.offsets[s + 1])):
            shown = [k for k in range(log.slate.shape[1]) if log.slate[r, k] >= 0]
            whole = math.exp(sum(weight[r, k] for k in shown))
            product *= whole
            for k in shown:
                w, seconds = math.exp(weight[r, k]), float(log.feedback[r, k, -1])
                number, mass, videos = number + 1, mass + w, videos + w * seconds
                doubly += direct[r, k, -1] + w * (seconds - expected[r, k, -1])
                slates, slate_mass = slates + whole * seconds, slate_mass + whole
                gain += 0.9**t * product * seconds

    def value(unit, name):
        return units[unit]["signals"]["watch_time"][name]["inf"]["value"]

    assert units["video"]["rows"] == number == sessions.num_exposures(log)
    assert units["slate"]["rows"] == log.num_requests and units["session"]["rows"] == log.num_sessions
    assert value("video", "ncis") == pytest.approx(videos / mass, rel=1e-9)
    assert value("video", "ips") == pytest.approx(videos / number, rel=1e-9)
    assert value("video", "dr") == pytest.approx(doubly / number, rel=1e-9)
    assert value("slate", "ncis") == pytest.approx(slates / slate_mass, rel=1e-9)
    assert value("session", "ips") == pytest.approx(gain / log.num_sessions, rel=1e-9)


def test_a_log_of_single_videos_has_one_unit():
    log, _ = scored()
    slate = log.slate.copy()
    slate[:, 1:] = -1
    log = sessions.freeze_histories(dataclasses.replace(log, slate=slate))
    assert list(off_policy.estimate_units(log, SHORT_VIDEO.names, np.zeros(slate.shape), 0.9, draws=5)) == ["video"]


def test_how_propensities_are_known():
    log, each = scored()
    kind, got, report = off_policy.log_propensities_of(None, log)
    assert kind == "logged" and report is None
    np.testing.assert_allclose(got, each)
    slate = log.slate.copy()
    slate[:, 1:] = -1
    known = np.full(log.num_requests, -math.log(10), np.float32)
    single = dataclasses.replace(log, slate=slate, scores=None, log_propensity=known)
    kind, got, _ = off_policy.log_propensities_of(None, single)
    assert kind == "known" and (got[:, 0] == known).all() and (got[:, 1:] == 0).all()


def test_refuses_propensities_that_do_not_hang_together():
    log, _ = scored()
    with pytest.raises(ValueError, match="from the logged ones; log the scores divided by the temperature"):
        off_policy.log_propensities_of(None, dataclasses.replace(log, scores=2.0 * log.scores))
    with pytest.raises(ValueError, match=f"{log.num_requests} of {log.num_requests} slates.*keep_scores=True"):
        off_policy.log_propensities_of(None, dataclasses.replace(log, scores=None))
