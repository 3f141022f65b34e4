"""Losses, means and levels by the kind of a signal, against formulas in NumPy."""

import any_signals
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from mmrf_jax.models import heads, kinds
from mmrf_jax.signals import Signals


@pytest.mark.parametrize("where", [(), (2,), (1, 2, 3), (0, 2), (3, 1)])
def test_take_is_numpys(where):
    x = np.arange(24.0).reshape(2, 4, 3)
    np.testing.assert_array_equal(kinds.take(jnp.asarray(x), where, -2), x[:, list(where)])


def test_join_puts_parts_where_they_belong():
    parts = {(2, 0): jnp.array([[20.0, 0.0]]), (): jnp.zeros((1, 0)), (1, 3): jnp.array([[10.0, 30.0]])}
    np.testing.assert_array_equal(kinds.join(parts, -1), [[0.0, 10.0, 20.0, 30.0]])


@pytest.fixture(params=any_signals.ALL)
def signals(request) -> Signals:
    return any_signals.ALL[request.param]


def by_hand(signals: Signals, raw, feedback, scale):
    """Losses and means [..., S] of raw predictions and feedback [..., S], signal by signal."""
    losses, means = np.zeros(raw.shape), np.zeros(raw.shape)
    for i, signal in enumerate(signals.signals):
        x, y = raw[..., i], feedback[..., i]
        if signal.kind == "binary":
            losses[..., i], means[..., i] = np.logaddexp(0.0, x) - y * x, expit(x)
        elif signal.kind == "value":
            losses[..., i], means[..., i] = 0.5 * (x - y / scale[i]) ** 2, scale[i] * x
        else:
            losses[..., i], means[..., i] = np.exp(x) - y / scale[i] * x, scale[i] * np.exp(x)
    return losses, means


def test_losses_and_means_by_hand(signals):
    rng = np.random.default_rng(0)
    raw, feedback = rng.normal(size=(2, 5, len(signals))), any_signals.make_feedback(rng, (2, 5), signals)
    scale = rng.uniform(0.5, 3.0, len(signals))
    losses, means = by_hand(signals, raw, np.float64(feedback), scale)
    predicted = jnp.asarray(np.moveaxis(raw, -1, -2))
    got = heads.feedback_loss(signals, predicted, jnp.asarray(feedback), jnp.asarray(scale))
    np.testing.assert_allclose(got, losses, rtol=1e-4, atol=1e-5)
    got = np.moveaxis(np.asarray(heads.expected_feedback(signals, predicted, jnp.asarray(scale))), -2, -1)
    np.testing.assert_allclose(got, means, rtol=1e-4)


def test_heads_start_from_the_means_of_the_log(signals):
    feedback = any_signals.make_feedback(np.random.default_rng(1), (4000,), signals)
    mean, std = feedback.mean(axis=0), feedback.std(axis=0)
    prior = heads.prior(signals, jnp.asarray(mean), jnp.asarray(std))
    got = heads.expected_feedback(signals, prior[:, None], jnp.asarray(std))[:, 0]
    np.testing.assert_allclose(got, mean, rtol=1e-3)


def test_levels_and_back(signals):
    feedback = any_signals.make_feedback(np.random.default_rng(2), (50,), signals)
    scale = np.linspace(0.5, 2.0, len(signals)).astype(np.float32)
    levels = kinds.levels(signals, feedback, scale)
    assert isinstance(levels, np.ndarray) and levels.shape == (50, len(signals.numeric))
    np.testing.assert_allclose(kinds.levels(signals, jnp.asarray(feedback), jnp.asarray(scale)), levels, rtol=1e-6)
    for q, i in enumerate(signals.numeric):
        wanted = feedback[:, i] / scale[i] if signals.signals[i].kind == "value" else np.log1p(feedback[:, i])
        np.testing.assert_allclose(levels[:, q], wanted, rtol=1e-6)
        back = kinds.of_level(signals, jnp.asarray(levels[:, q]), jnp.asarray(scale), i)
        np.testing.assert_allclose(back, feedback[:, i], rtol=1e-4, atol=1e-4)
