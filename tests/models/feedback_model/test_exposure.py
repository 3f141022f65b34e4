"""What the logging ranker shows: propensities and weights by hand, and what they do to the fit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmrf_jax.models.feedback_model import counterfactuals, exposure, fitting, network
from mmrf_jax.signals import SHORT_VIDEO, Signal, Signals

S, WATCH = tiny.S, SHORT_VIDEO.index("watch_time")
CONFIG = dataclasses.replace(tiny.FEEDBACK, dropout=0.0, debias="propensity", imputed_weight=0.5, exposures=2)


def one_request(odds, slate, mask, weight=None):
    """A batch of one request with these candidates, and their scores."""
    batch = tiny.make_batch(users=1, requests=0)
    batch = batch.replace(
        candidates=np.arange(len(odds), dtype=np.int32)[None, None],
        slate=np.array(slate, np.int32)[None, None],
        slate_mask=np.array(mask)[None, None],
        weight=None if weight is None else np.array(weight, np.float32)[None, None],
    )
    return jnp.log(jnp.asarray(odds, jnp.float32))[None, None], batch


def test_propensities_of_slots_by_hand():
    each, ratio = exposure.log_propensities(*one_request([1.0, 2.0, 3.0, 4.0], [2, 0, 1], [True, True, False]))
    np.testing.assert_allclose(np.exp(each[0, 0]), [3 / 10, 1 / 7, 1.0], rtol=1e-5)
    np.testing.assert_allclose(np.exp(ratio[0, 0]), [4 * 3 / 10, 3 * 1 / 7, 1.0], rtol=1e-5)


def test_a_sampled_candidate_stands_for_several():
    """The last of four candidates represents three of the same score: six candidates in all."""
    arguments = one_request([1.0, 2.0, 3.0, 4.0], [2, 0], [True, True], weight=[1.0, 1.0, 1.0, 3.0])
    each, ratio = exposure.log_propensities(*arguments)
    np.testing.assert_allclose(np.exp(each[0, 0]), [3 / 18, 1 / 15], rtol=1e-5)
    np.testing.assert_allclose(np.exp(ratio[0, 0]), [6 * 3 / 18, 5 * 1 / 15], rtol=1e-5)


def test_weights_are_inverse_and_capped_and_one_for_random_slates():
    ratio = jnp.log(jnp.array([[[2.0, 0.5, 0.01], [2.0, 0.5, 0.01]]]))
    cap = exposure.MAX_WEIGHT
    np.testing.assert_allclose(exposure.weights(ratio), [[[0.5, 2.0, cap], [0.5, 2.0, cap]]], rtol=1e-5)
    random = jnp.array([[False, True]])
    np.testing.assert_allclose(exposure.weights(ratio, random), [[[0.5, 2.0, cap], [1.0, 1.0, 1.0]]], rtol=1e-5)
    assert not np.any(jax.grad(lambda x: exposure.weights(x).sum())(ratio))


def test_the_fit_weights_exposures_by_their_inverse_propensity_and_imputes_videos_that_were_not_shown():
    state, items, batch = tiny.make_feedback_model(CONFIG), tiny.make_items(), tiny.make_batch()
    random = np.arange(5) % 2 == 1  # every other request
    batch = batch.replace(context=np.concatenate([random[None, :, None].repeat(8, 0), batch.context[..., 1:]], axis=-1))
    batch = batch.replace(context=batch.context.astype(np.float32))

    @jax.jit
    def both(state):
        encoded = network.encode_batch(CONFIG, state, batch, items, jnp.asarray(batch.candidates))
        out = network.predict(CONFIG, state.params, *encoded.user, encoded.shown)
        scores = network.exposure_scores(CONFIG, state.params, encoded, encoded.unseen)
        every = network.predict(CONFIG, state.params, *encoded.user, encoded.unseen)
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        places = counterfactuals.unseen_slates(key, batch.without_last(), 1)
        return out, scores, every, places[:, :, 0], fitting.update(state, batch, items, CONFIG)

    out, scores, every, places, (after, metrics) = jax.device_get(both(state))
    exposed = batch.slate_mask & batch.mask[..., None]
    loss, expected, chosen = np.zeros((2, 2)), np.zeros(2), 0
    for n in range(2):
        total, weights = np.zeros(2), 0.0
        for b, t in np.ndindex(8, 4):
            left = np.exp(np.float64(scores[n, b, t]))
            for k in np.flatnonzero(exposed[b, t]):
                p = left[batch.slate[b, t, k]] / left.sum()
                w = 1.0 if random[t] else min(1.0 / (p * np.count_nonzero(left)), exposure.MAX_WEIGHT)
                if not random[t]:
                    expected[n] -= np.log(p)
                    chosen += 1
                left[batch.slate[b, t, k]] = 0.0
                raw, label = np.float64(out.feedback[n, b, t, :, k]), np.float64(batch.feedback[b, t, k])
                click = np.logaddexp(0.0, raw[0]) - label[0] * raw[0]
                total += w * np.array([click, np.exp(raw[WATCH]) - label[WATCH] / 15.0 * raw[WATCH]])
                weights += w
        loss[n] = total / weights
        for b, t, k in np.argwhere(exposed[:, :4]):
            if not random[t]:  # as many as were shown, of which none was shown, without feedback
                assert places[b, t, k] not in batch.slate[b, t][batch.slate_mask[b, t]]
                raw = np.float64(every.feedback[n, b, t, :, places[b, t, k]])
                none = np.array([np.logaddexp(0.0, raw[0]), np.exp(raw[WATCH])])
                loss[n] += 0.5 * none / exposed[:, :4].sum()
    assert float(metrics["loss/click"]) == pytest.approx(loss[:, 0].mean(), rel=1e-4)
    assert float(metrics["loss/watch_time"]) == pytest.approx(loss[:, 1].mean(), rel=1e-4)
    assert float(metrics["loss/exposure"]) == pytest.approx(expected.sum() / chosen, rel=1e-4)
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), state.params["exposure"], after.params["exposure"])
    assert all(jax.tree.leaves(moved))


def test_calibration_weighs_exposures_and_imputed_videos_as_the_fit_does(monkeypatch):
    rng, batch, binary = np.random.default_rng(0), tiny.make_batch(users=64), S - 1
    shape = (64, 5, 3)
    raw, unseen = (rng.normal(size=(*shape, binary)).astype(np.float32) for _ in range(2))
    weight = rng.uniform(0.2, 3.0, shape)
    imputed = 0.5 * (batch.slate_mask & batch.mask[..., None])
    found = (np.zeros((*shape, 1), np.float32), np.ones((*shape, S), np.float32), raw, weight, (unseen, imputed))
    monkeypatch.setattr(fitting, "_measure", lambda *_: found)
    config = dataclasses.replace(CONFIG, exposures=1)
    fresh = tiny.make_feedback_model(CONFIG)
    fresh = fresh.replace(calibration=fresh.calibration[:1])
    state = fitting.measure(fresh, [batch], None, config, calibrate=True)
    shown, none = (batch.slate_mask & batch.mask[..., None])[:, :-1], imputed[:, :-1] > 0
    for i in range(3):
        expected = fitting.platt(
            np.concatenate([raw[:, :-1][shown][:, i], unseen[:, :-1][none][:, i]]),
            np.concatenate([batch.feedback[:, :-1][shown][:, i], np.zeros(none.sum())]),
            np.concatenate([weight[:, :-1][shown] / weight[:, :-1][shown].mean(), np.full(none.sum(), 0.5)]),
        )
        np.testing.assert_allclose(state.calibration[0, :, i], expected, rtol=1e-5)


def test_a_value_has_no_zero_that_means_no_feedback():
    assert fitting._can_be_none(CONFIG).tolist() == [1.0] * (S + 1)
    rating = Signals((Signal("click"), Signal("rating", kind="value")), ("click",))
    assert fitting._can_be_none(dataclasses.replace(CONFIG, all_signals=rating)).tolist() == [1.0, 0.0, 0.0]


def test_without_a_correction_nothing_is_added():
    plain = dataclasses.replace(CONFIG, debias=None)
    init = functools.partial(network.init_feedback_state, spec=tiny.SPEC, items=tiny.make_items())
    ones = np.full(S, 0.5)
    without, with_it = (
        jax.eval_shape(lambda key, c=c: init(key, c, feedback_mean=ones, feedback_std=ones), jax.random.key(0)).params
        for c in (plain, CONFIG)
    )
    assert set(with_it) - set(without) == {"exposure"}
