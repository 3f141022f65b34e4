"""Feedback drawn from predictions, and slates of videos that were not shown."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import expit

from mmrf_jax import types
from mmrf_jax.models import embeddings, encoders
from mmrf_jax.models.feedback_model import counterfactuals, network
from mmrf_jax.signals import SHORT_VIDEO

CONFIG, S, WATCH = tiny.FEEDBACK, tiny.S, SHORT_VIDEO.index("watch_time")
CLICK, LONG = SHORT_VIDEO.index("click"), SHORT_VIDEO.index("long_view")
BINS, QUANTILES, NUM_UNIFORMS = network.BINS, network.QUANTILES, counterfactuals.num_uniforms(SHORT_VIDEO)


def draw(expected, log_seconds, edges, quantiles, uniforms):
    """`counterfactuals.draw` of the nine signals, of which one is numeric."""
    ones = np.ones(S, np.float32)
    levels = log_seconds[..., None]
    return counterfactuals.draw(SHORT_VIDEO, expected, levels, edges[None], quantiles[None], ones, uniforms)


def tables(rng):
    """Edges, and quantiles of residuals that grow with the prediction."""
    edges = np.linspace(1.0, 3.0, BINS - 1).astype(np.float32)
    quantiles = np.sort(rng.normal(size=(BINS, QUANTILES)) * np.linspace(0.2, 1.0, BINS)[:, None], axis=1)
    return edges, quantiles.astype(np.float32)


def test_seconds_follow_the_residuals_of_like_predictions():
    rng = np.random.default_rng(0)
    edges, quantiles = tables(rng)
    log_seconds = rng.uniform(0.0, 4.0, (40, 5)).astype(np.float32)
    log_seconds[0] = edges[[0, 3, 7, 13, 14]]  # on an edge, the bin below it
    uniforms = rng.uniform(1e-6, 1.0, (40, 5, NUM_UNIFORMS)).astype(np.float32)
    uniforms[1, :, 0] = [1e-7, 0.5, 1.0 - 1e-7, 1.0 / 64, 0.75]
    got = np.asarray(draw(np.full((40, 5, S), 0.5, np.float32), log_seconds, edges, quantiles, uniforms))
    assert got.shape == (40, 5, S) and got.dtype == np.float32
    grid, row = np.linspace(0.0, 1.0, QUANTILES), np.searchsorted(edges, log_seconds, side="left")
    for i in np.ndindex(40, 5):
        residual = np.interp(uniforms[i][0], grid, np.float64(quantiles[row[i]]))
        seconds = max(np.expm1(np.float64(log_seconds[i]) + residual), 0.0)
        assert got[i][WATCH] == pytest.approx(seconds, rel=1e-3, abs=1e-4)


def test_seconds_are_never_negative():
    rng = np.random.default_rng(1)
    edges, quantiles = tables(rng)
    uniforms = rng.uniform(1e-6, 1.0, (500, NUM_UNIFORMS)).astype(np.float32)
    drawn = draw(np.full((500, S), 0.5, np.float32), np.full(500, -0.5), edges, quantiles - 1.0, uniforms)
    assert (np.asarray(drawn)[:, WATCH] >= 0).all() and (np.asarray(drawn)[:, WATCH] == 0).mean() > 0.5


@pytest.fixture(scope="module")
def many():
    """Expected feedback [S] and 200,000 draws with it."""
    rng = np.random.default_rng(2)
    edges, quantiles = tables(rng)
    expected = np.append(rng.permutation(np.linspace(0.03, 0.8, S - 1)), 10.0).astype(np.float32)
    n = 200_000
    uniforms = rng.uniform(1e-7, 1.0, (n, NUM_UNIFORMS)).astype(np.float32)
    drawn = jax.jit(draw)(np.broadcast_to(expected, (n, S)), np.full(n, 2.0, np.float32), edges, quantiles, uniforms)
    return expected, np.asarray(drawn)


def test_means_of_binary_signals_are_those_expected(many):
    expected, drawn = many
    assert set(np.unique(drawn[:, :WATCH])) == {0.0, 1.0}
    p = expected[:WATCH].astype(np.float64)
    z = (drawn[:, :WATCH].mean(axis=0, dtype=np.float64) - p) / np.sqrt(p * (1 - p) / len(drawn))
    assert np.abs(z).max() < 4.5


def test_click_and_long_view_come_with_the_longest_plays(many):
    expected, drawn = many
    for signal in (CLICK, LONG):
        happened = drawn[:, signal] == 1
        assert drawn[happened, WATCH].min() >= drawn[~happened, WATCH].max() * (1 - 1e-5)
    rarer, other = (CLICK, LONG) if expected[CLICK] < expected[LONG] else (LONG, CLICK)
    assert (drawn[drawn[:, rarer] == 1, other] == 1).all()


def test_the_other_signals_are_drawn_apart(many):
    _, drawn = many
    names = [i for i, name in enumerate(SHORT_VIDEO.binary_names) if name not in ("click", "long_view")]
    correlation = np.corrcoef(drawn[:, [*names, CLICK]].T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 5.0 / np.sqrt(len(drawn))
    assert len(names) + 1 == NUM_UNIFORMS


def test_unseen_slates_are_different_and_never_shown():
    batch = tiny.make_batch(users=64)
    batch = batch.replace(slate_mask=batch.slate_mask & (np.arange(3) < 2))  # 8 candidates: 2 shown, 6 not
    slates = np.asarray(counterfactuals.unseen_slates(jax.random.key(0), batch, 2))
    assert slates.shape == (64, 5, 2, 3) and slates.min() >= 0 and slates.max() < 8
    flat = np.sort(slates.reshape(64, 5, 6), axis=-1)
    assert (np.diff(flat, axis=-1) > 0).all()
    shown = (np.arange(8) == batch.slate[..., None]) & batch.slate_mask[..., None]  # [B, T+1, K, C]
    drawn = (np.arange(8) == flat[..., None]).any(axis=-2)
    assert not (shown.any(axis=-2) & drawn).any()
    # Position 0 stands in every empty slot of a slate: it may be drawn all the same.
    empty = ~batch.slate_mask.any(axis=-1)
    assert empty.any() and drawn[empty][:, 0].mean() > 0.5
    other = np.asarray(counterfactuals.unseen_slates(jax.random.key(1), batch, 2))
    assert (slates != other).mean() > 0.5


def test_unseen_slates_are_uniform():
    users, c = 4000, 8
    batch = tiny.make_batch(users=2)
    batch = jax.tree.map(lambda x: np.repeat(x[1:2], users, axis=0), batch)  # two requests, then none
    slates = np.asarray(counterfactuals.unseen_slates(jax.random.key(3), batch, 1))
    for t in range(5):
        free = np.setdiff1d(np.arange(c), batch.slate[0, t][batch.slate_mask[0, t]])
        n = len(free)
        for k in range(3):  # each place of a slate
            count = np.bincount(slates[:, t, 0, k], minlength=c)[free]
            assert count.sum() == users
            assert ((count - users / n) ** 2).sum() / (users / n) < n + 6.0 * np.sqrt(2.0 * n)  # chi-square
        pairs = np.bincount(slates[:, t, 0, 0] * c + slates[:, t, 0, 1], minlength=c * c).reshape(c, c)[free][:, free]
        pairs = pairs[~np.eye(n, dtype=bool)]
        mean = users / len(pairs)
        assert ((pairs - mean) ** 2).sum() / mean < len(pairs) + 6.0 * np.sqrt(2.0 * len(pairs))


def test_preferred_candidates_are_drawn_more_often():
    """The first draw is by the softmax of the sampling logits over what was not shown."""
    users, c = 4000, 8
    batch = tiny.make_batch(users=2)
    batch = jax.tree.map(lambda x: np.repeat(x[1:2], users, axis=0), batch)
    logits = np.broadcast_to(np.linspace(-1.0, 1.5, c), (*batch.candidates.shape[:2], c))
    slates = np.asarray(counterfactuals.unseen_slates(jax.random.key(3), batch, 1, logits))
    for t in range(5):
        free = np.setdiff1d(np.arange(c), batch.slate[0, t][batch.slate_mask[0, t]])
        chance = np.exp(logits[0, t, free])
        expected = users * chance / chance.sum()
        count = np.bincount(slates[:, t, 0, 0], minlength=c)
        assert count.sum() == count[free].sum() == users
        n = len(free)
        assert ((count[free] - expected) ** 2 / expected).sum() < n + 6.0 * np.sqrt(2.0 * n)  # chi-square


@pytest.fixture(scope="module")
def answered():
    """A state, a batch, and answer(measure) -> two slates of each of its requests by one key."""
    state, items = tiny.make_feedback_model(), tiny.make_items()
    batch = tiny.make_batch()
    batch = batch.replace(slate_mask=batch.slate_mask & (np.arange(3) < 2))
    fn = jax.jit(
        counterfactuals.simulate_counterfactual_slates, static_argnames=("config", "num_slates", "measure_uncertainty")
    )

    def answer(measure):
        return jax.device_get(fn(state, batch, items, CONFIG, jax.random.key(4), 2, measure))

    return state, items, batch, answer(True), answer(False)


def test_answers_have_the_shapes_of_their_slates(answered):
    _, _, batch, simulated, _ = answered
    assert simulated.slates.shape == (8, 5, 2, 3)
    for name in ("expected", "uncertainty", "sampled"):
        value = getattr(simulated, name)
        assert value.shape == (8, 5, 2, 3, S) and value.dtype == np.float32 and np.isfinite(value).all()
        assert (value >= 0).all()
    assert (
        simulated.continue_prob.shape == (8, 5, 2)
        and (simulated.continue_prob > 0).all()
        and (simulated.continue_prob < 1).all()
    )
    assert (simulated.expected[..., :WATCH] < 1).all() and (simulated.uncertainty.max(axis=(0, 1, 2, 3)) > 0).all()
    assert set(np.unique(simulated.sampled[..., :WATCH])) == {0.0, 1.0}
    shown = (np.arange(8) == batch.slate[..., None]) & batch.slate_mask[..., None]
    drawn = (np.arange(8) == simulated.slates.reshape(8, 5, 6)[..., None]).any(axis=-2)
    assert not (shown.any(axis=-2) & drawn).any()


def test_uncertainty_is_zero_where_it_is_not_measured(answered):
    *_, with_it, without = answered
    np.testing.assert_array_equal(without.uncertainty, 0.0)
    assert set(tiny.differences(with_it, without)) == {".uncertainty"}


def test_answers_by_hand(answered):
    """As predicted for the same videos if they were candidates of a log, each slate's effects added on each twin."""
    state, items, batch, simulated, _ = answered
    videos = np.take_along_axis(batch.candidates, simulated.slates.reshape(8, 5, 6), axis=-1)

    @jax.jit
    def predict(state):
        r = network.encode_batch(CONFIG, state, batch, items)

        def encode(p, rows):
            return encoders.Encoder(CONFIG).apply(p, rows, items.features[videos], method="items")

        rows = network.twin_rows(
            embeddings.lookup(
                {n: state.tables[n] for n in embeddings.VIDEO_TABLES}, embeddings.video_ids(items, videos)
            )
        )
        return network.predict(
            CONFIG, state.params, r.z, r.memory_mean, jax.vmap(encode)(state.params["encoder"], rows)
        )

    out = jax.tree.map(np.float64, predict(state))
    logit = out.continue_logit[..., None] + out.continue_item_logit.reshape(2, 8, 5, 2, 3).sum(axis=-1)
    np.testing.assert_allclose(simulated.continue_prob, expit(logit).mean(axis=0), rtol=1e-4)
    raw = np.moveaxis(out.feedback, -2, -1).reshape(2, 8, 5, 2, 3, S)
    np.testing.assert_allclose(simulated.expected[..., :WATCH], expit(raw[..., :WATCH]).mean(axis=0), rtol=1e-4)
    seconds = 15.0 * np.exp(raw[..., WATCH]).mean(axis=0)
    np.testing.assert_allclose(simulated.expected[..., WATCH], seconds, rtol=1e-4)
    pool = simulated.pool  # of all candidates; here at the places of the slates
    assert pool.feedback.shape == (8, 5, S, 8) and pool.continue_item_logit.shape == (8, 5, 8)
    places = simulated.slates.reshape(8, 5, 6)

    def at(x, places):
        return np.take_along_axis(x, places, axis=-1)

    np.testing.assert_allclose(at(pool.feedback, places[:, :, None]), out.feedback.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        at(pool.continue_item_logit, places), out.continue_item_logit.mean(axis=0), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(pool.continue_logit, out.continue_logit.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_no_slates_leave_the_view_of_the_pool(answered):
    state, items, batch, simulated, _ = answered
    fn = jax.jit(
        counterfactuals.simulate_counterfactual_slates, static_argnames=("config", "num_slates", "measure_uncertainty")
    )
    alone = fn(state, batch, items, CONFIG, jax.random.key(4), 0, False)
    assert alone.slates.shape == (8, 5, 0, 3) and alone.continue_prob.shape == (8, 5, 0)
    assert max(tiny.differences(alone.pool, simulated.pool).values(), default=0.0) < 1e-5


def test_kept_encodings_answer_alike(answered):
    state, items, batch, simulated, _ = answered
    kept = network.encode_items(state, items, CONFIG)
    assert kept.shape[:2] == (2, items.num_videos)
    fn = jax.jit(
        counterfactuals.simulate_counterfactual_slates, static_argnames=("config", "num_slates", "measure_uncertainty")
    )
    again = fn(state, batch, items, CONFIG, jax.random.key(4), 2, True, encodings=kept)
    assert max(tiny.differences(again, simulated).values(), default=0.0) < 1e-4


def test_uncertainty_is_in_units_of_its_scale(answered):
    state, items, batch, simulated, _ = answered
    scale = state.uncertainty_scale * jnp.arange(1.0, S + 1)
    fn = jax.jit(
        counterfactuals.simulate_counterfactual_slates, static_argnames=("config", "num_slates", "measure_uncertainty")
    )
    other = fn(state.replace(uncertainty_scale=scale), batch, items, CONFIG, jax.random.key(4), 2, True)
    np.testing.assert_allclose(other.uncertainty * np.arange(1.0, S + 1), simulated.uncertainty, rtol=1e-4)


def test_unseen_videos_are_labelled_as_if_exposed_at_random():
    """Where requests say how they were exposed, the labels do not depend on it: they are those of random exposures."""
    state, items, batch = tiny.make_feedback_model(), tiny.make_items(), tiny.make_batch()
    config = dataclasses.replace(CONFIG, exposures=2)
    state = state.replace(calibration=jnp.stack([state.calibration[0], 1.5 * state.calibration[0]]))
    fn = jax.jit(counterfactuals.predict, static_argnames="config")

    def labelled(flag):
        context = batch.context.copy()
        context[..., 0] = flag
        return fn(state, batch.replace(context=context), items, config)

    standard, random = labelled(0.0), labelled(1.0)
    np.testing.assert_array_equal(standard.feedback, random.feedback)
    one_kind = state.replace(calibration=state.calibration[1:])
    marked = batch.replace(context=np.asarray(types.as_if_at_random(batch.context)))
    np.testing.assert_array_equal(fn(one_kind, marked, items, CONFIG).feedback, random.feedback)
    assert (np.asarray(fn(one_kind, batch, items, CONFIG).feedback) != random.feedback).mean() > 0.9
