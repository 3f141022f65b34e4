"""Counterfactual feedback on signals that are not those of short videos."""

import any_signals
import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax.models.feedback_model import counterfactuals, network
from mmrf_jax.signals import SHORT_VIDEO, Signal, Signals


def draw(signals: Signals, n: int, level: float = 1.0, spread: float = 0.0, seed: int = 0) -> np.ndarray:
    """Draws [n, S] with probabilities of .3, and numeric signals of one level with residuals of a normal spread."""
    rng, numeric = np.random.default_rng(seed), len(signals.numeric)
    uniforms = rng.uniform(1e-7, 1.0, (n, counterfactuals.num_uniforms(signals))).astype(np.float32)
    quantiles = spread * np.sort(rng.normal(size=(numeric, network.BINS, network.QUANTILES)), axis=-1)
    return np.asarray(
        counterfactuals.draw(
            signals,
            jnp.full((n, len(signals)), 0.3),
            jnp.full((n, numeric), level),
            jnp.zeros((numeric, network.BINS - 1)),
            jnp.asarray(quantiles, jnp.float32),
            jnp.full((len(signals),), 2.0),
            jnp.asarray(uniforms),
        )
    )


@pytest.mark.parametrize("name", any_signals.ALL)
def test_signals_are_drawn_by_kind(name):
    signals = any_signals.ALL[name]
    drawn = draw(signals, 20_000)
    assert counterfactuals.num_uniforms(signals) == len(signals)
    for i, signal in enumerate(signals.signals):
        if signal.kind == "binary":
            assert set(np.unique(drawn[:, i])) == {0.0, 1.0}
            assert drawn[:, i].mean() == pytest.approx(0.3, abs=0.015)
        else:
            seconds = np.expm1(1.0)
            wanted = {"duration": seconds, "count": np.round(seconds), "value": 2.0}[signal.kind]
            np.testing.assert_allclose(drawn[:, i], wanted, rtol=1e-5)


def test_signals_are_drawn_apart():
    drawn = draw(any_signals.TWELVE, 20_000, spread=0.5)
    correlation = np.corrcoef(drawn.T)
    assert np.abs(correlation - np.eye(12)).max() < 5.0 / np.sqrt(20_000)


def test_clicks_follow_watch_time_only_where_both_are():
    without = Signals((Signal("click"), Signal("long_view"), Signal("dwell", kind="duration")), ("dwell",))
    some = Signals((Signal("watch_time", kind="duration"), Signal("click")), ("watch_time",))
    assert counterfactuals.num_uniforms(without) == 3 and counterfactuals.num_uniforms(some) == 2
    assert counterfactuals.num_uniforms(SHORT_VIDEO) == 7
    turned = Signals(SHORT_VIDEO.signals[::-1], SHORT_VIDEO.agents)  # watch time first
    drawn = draw(turned, 20_000, spread=0.5)
    happened = drawn[:, turned.index("click")] == 1
    assert drawn[happened, 0].min() >= drawn[~happened, 0].max()
