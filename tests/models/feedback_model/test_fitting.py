"""Fitting the feedback model: its losses by hand, what it learns in a world whose truth is known, what is measured."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mmrf_jax.data import sessions
from mmrf_jax.data.session_log import InputSpec, Sessions
from mmrf_jax.models import heads, representation
from mmrf_jax.models.feedback_model import fitting, network
from mmrf_jax.signals import SHORT_VIDEO

CONFIG, S, WATCH = tiny.FEEDBACK, tiny.S, SHORT_VIDEO.index("watch_time")
STILL = dataclasses.replace(CONFIG, dropout=0.0, twin_feature_dropout=(0.0, 0.0))
SCALE = np.append(np.full(S - 1, 0.5), 20.0).astype(np.float32)
T, BATCH = 3, 96


@pytest.fixture(scope="module")
def items():
    return tiny.make_items()


@functools.partial(jax.jit, static_argnames="config")
def predict(config, state, batch, items):
    r = network.encode_batch(config, state, batch, items)
    return network.predict(config, state.params, r.z, r.memory_mean, r.shown)


@pytest.mark.parametrize("loss", ["likelihood", "mse"])
def test_losses_of_one_exposure_by_hand(loss):
    raw = np.zeros((2, S, 1), np.float32)
    raw[:, 0, 0] = [0.0, np.log(3.0)]  # probabilities 1/2 and 3/4
    raw[:, WATCH, 0] = [0.0, np.log(2.0)]  # 20 s and 40 s
    extra = np.array([[[1.0]], [[3.0]]], np.float32)
    out = heads.Prediction(jnp.asarray(raw), jnp.asarray(extra), jnp.zeros(2), jnp.zeros((2, 1)))
    feedback = np.zeros((1, S), np.float32)
    feedback[0, 0], feedback[0, WATCH] = 1.0, 30.0
    got = np.asarray(fitting.losses(dataclasses.replace(CONFIG, loss=loss), out, feedback, SCALE))
    assert got.shape == (2, 1, S + 1)
    click = [np.log(2.0), np.log(4.0 / 3.0)] if loss == "likelihood" else [0.25, 0.0625]
    watch = [1.0, 2.0 - 1.5 * np.log(2.0)] if loss == "likelihood" else [0.25, 0.25]
    np.testing.assert_allclose(got[:, 0, 0], click, rtol=1e-5)
    np.testing.assert_allclose(got[:, 0, WATCH], watch, rtol=1e-5)
    np.testing.assert_allclose(got[:, 0, 1:WATCH], np.log(2.0) if loss == "likelihood" else 0.25, rtol=1e-5)
    np.testing.assert_allclose(got[:, 0, S], (np.array([1.0, 3.0]) - np.log(31.0)) ** 2, rtol=1e-5)


@pytest.fixture(scope="module")
def still_step(items):
    fn = jax.jit(functools.partial(fitting.update, config=STILL))
    return lambda state, batch: fn(state, batch, items)


def test_metrics_are_means_over_exposures_and_twins(still_step, items):
    state, batch = tiny.make_feedback_model(), tiny.make_batch()
    out = jax.tree.map(np.float64, predict(STILL, state, batch, items))
    _, metrics = still_step(state, batch)
    sums, stay = np.zeros(S + 1), []
    exposed = batch.slate_mask & batch.mask[..., None]
    for n, b, t in np.ndindex(2, 8, 4):
        for k in np.flatnonzero(exposed[b, t]):
            raw, label = out.feedback[n, b, t, :, k], np.float64(batch.feedback[b, t, k])
            sums[:WATCH] += np.logaddexp(0.0, raw[:WATCH]) - label[:WATCH] * raw[:WATCH]
            sums[WATCH] += np.exp(raw[WATCH]) - label[WATCH] / 15.0 * raw[WATCH]
            sums[S] += (out.extra[n, b, t, 0, k] - np.log1p(label[WATCH])) ** 2
        if batch.mask[b, t] and (batch.terminated[b, t] or batch.mask[b, t + 1]):  # of a cut session no one knows
            logit = out.continue_logit[n, b, t] + out.continue_item_logit[n, b, t, exposed[b, t]].sum()
            stay.append(np.logaddexp(0.0, logit if batch.terminated[b, t] else -logit))
    means = sums / (2 * exposed[:, :-1].sum())
    for i, name in enumerate((*SHORT_VIDEO.names, "level_watch_time")):
        assert float(metrics[f"loss/{name}"]) == pytest.approx(means[i], rel=1e-4), name
    assert float(metrics["loss/continuation"]) == pytest.approx(np.mean(stay), rel=1e-4)


# A world in which a click depends on profile and tag, and staying on how many videos of tag 1 there were.

WORLD = InputSpec(
    num_videos=40,
    num_authors=5,
    num_tags=2,
    num_users=0,
    item_features=1,
    profile=2,
    context=1,
    candidates=8,
    slate=3,
    history=2,
)
TAG = np.arange(40) % 2
WORLD_ITEMS = dataclasses.replace(
    tiny.make_items(WORLD), tag=jnp.asarray(TAG, jnp.int32), features=jnp.zeros((40, 1), jnp.float32)
)


def click_probability(profile, tags):
    return np.where((profile[..., :1] > 0) == (tags == 1), 0.8, 0.15)


def odds_of_continuing(tags):
    return expit(1.0 - 2.0 * ((tags == 1).sum(axis=-1) - 1.5))


def world_log(seed, users):
    """Sessions of at most T requests of uniformly drawn videos."""
    rng = np.random.default_rng(seed)
    profile = rng.choice([-1.0, 1.0], (users, 2)).astype(np.float32)
    candidates = rng.random((users, T, 40)).argsort(axis=-1)[..., :8].astype(np.int32)
    slate = rng.random((users, T, 8)).argsort(axis=-1)[..., :3].astype(np.int32)
    tags = TAG[np.take_along_axis(candidates, slate, axis=-1)]
    feedback = np.zeros((users, T, 3, S), np.float32)
    click = rng.random(tags.shape) < click_probability(profile[:, None], tags)
    feedback[..., 0] = click
    feedback[..., WATCH] = np.where(click, 20.0, 4.0) * rng.uniform(0.5, 1.5, tags.shape)
    stays = rng.random((users, T)) < odds_of_continuing(tags)
    live = np.cumprod(np.concatenate([np.ones((users, 1), bool), stays[:, :-1]], axis=1), axis=1).astype(bool)
    lengths = live.sum(axis=1)
    left = ~stays[np.arange(users), lengths - 1]
    return Sessions(
        user_id=np.arange(users, dtype=np.int32),
        date=np.zeros(users, np.int32),
        profile=profile,
        history_videos=np.zeros((users, 2), np.int32),
        history_feedback=np.zeros((users, 2, S), np.float32),
        history_mask=np.zeros((users, 2), bool),
        terminated=left,
        truncated=~left,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        candidates=candidates[live],
        context=np.log1p(np.broadcast_to(np.arange(T), (users, T)))[live][:, None].astype(np.float32),
        slate=slate[live],
        feedback=feedback[live],
        log_propensity=np.zeros(lengths.sum(), np.float32),
        scores=None,
    )


@pytest.fixture(scope="module")
def fitted():
    log = world_log(0, 1500)
    config = dataclasses.replace(CONFIG, learning_rate=0.01, dropout=0.1)
    seen = log.feedback.reshape(-1, S)
    init = jax.jit(network.init_feedback_state, static_argnames=("config", "spec"))
    state = init(jax.random.key(0), config, WORLD, WORLD_ITEMS, seen.mean(axis=0), seen.std(axis=0))
    fn = jax.jit(functools.partial(fitting.update, config=config), compiler_options=tiny.HOT)

    def step(state, batch):
        return fn(state, batch, WORLD_ITEMS)

    index, rng = sessions.segment_index(log, T), np.random.default_rng(0)
    for _ in range(200):
        state, _ = step(state, sessions.gather_segments(log, rng.choice(index, BATCH), T))
    return config, state, step


def test_what_is_masked_is_not_fitted_to_the_bit(fitted):
    """With dropout: the masks of a step hang on the key and the step alone."""
    _, state, step = fitted
    batch = tiny.make_batch(users=BATCH, requests=T, spec=WORLD)
    reference, metrics = step(state, batch)
    assert int(reference.step) == int(state.step) + 1
    rng = np.random.default_rng(0)
    dark, gone = ~batch.slate_mask, ~batch.mask
    last = np.broadcast_to(np.arange(T + 1) == T, gone.shape)

    def put(where, x, new):
        return np.where(where.reshape(*where.shape, *[1] * (x.ndim - where.ndim)), new, x)

    noise = np.abs(rng.normal(size=batch.feedback.shape)).astype(np.float32)
    other = batch.replace(
        feedback=put(dark | last[..., None], batch.feedback, noise),
        slate=put(dark, batch.slate, rng.integers(0, 8, batch.slate.shape, dtype=np.int32)),
        slate_mask=batch.slate_mask | gone[..., None],
        context=put(gone, batch.context, 5.0),
        candidates=put(gone, batch.candidates, batch.candidates[::-1]),
        terminated=batch.terminated | gone | last,
    )
    after, other_metrics = step(state, other)
    assert not tiny.differences(reference, after)
    assert not tiny.differences(metrics, other_metrics)
    assert tiny.differences(metrics, step(state, batch.replace(feedback=2.0 * batch.feedback))[1])


def test_dropout_draws_anew_each_step_and_repeats_with_its_key(fitted):
    _, state, step = fitted
    batch = tiny.make_batch(users=BATCH, requests=T, spec=WORLD)
    first, again = step(state, batch)[1], step(state, batch)[1]
    second = step(state.replace(step=state.step + 1), batch)[1]
    assert not tiny.differences(first, again) and tiny.differences(first, second)


def test_learns_clicks_watch_time_and_staying(fitted):
    """Against the truth, for users who were not fitted on."""
    config, state, _ = fitted
    log = world_log(1, 500)
    batch = sessions.gather_segments(log, sessions.segment_index(log, T), T)
    out = predict(config, state, batch, WORLD_ITEMS)
    shown = batch.slate_mask & batch.mask[..., None]
    tags = TAG[np.take_along_axis(batch.candidates, batch.slate, axis=-1)]
    truth = click_probability(batch.profile[:, None], tags)
    expected = np.asarray(network.expected(CONFIG, out, state.scale))
    assert np.abs(expected[..., 0] - truth)[shown].mean() < 0.05
    assert roc_auc_score(batch.feedback[..., 0][shown], expected[..., 0][shown]) > 0.8
    seconds = truth * 20.0 + (1.0 - truth) * 4.0
    assert np.abs(expected[..., WATCH] / seconds - 1.0)[shown].mean() < 0.15
    stay = np.asarray(network.continue_prob(out, jnp.ones(tags.shape)))[batch.mask]
    continue_prob = odds_of_continuing(tags)[batch.mask]
    assert np.abs(stay - continue_prob).mean() < 0.4 * np.abs(continue_prob.mean() - continue_prob).mean()


@pytest.fixture(scope="module")
def measured(fitted):
    """Two batches of users who were not fitted on, and the state with what is measured on them."""
    config, state, _ = fitted
    log = world_log(2, 200)
    index = sessions.segment_index(log, T)
    batches = [sessions.gather_segments(log, index[i : i + 100], T) for i in (0, 100)]
    return batches, fitting.measure(state, batches, WORLD_ITEMS, config)


def test_uncertainty_is_one_on_impressions(fitted, measured):
    """On average, divided by its scale."""
    config, *_ = fitted
    batches, state = measured
    u = []
    for b in batches:
        shown = np.asarray(b.loss_masks().exposure) > 0
        u.append(_uncertainty(config, state, b, WORLD_ITEMS)[:, :-1][shown])
    np.testing.assert_allclose(np.concatenate(u).mean(axis=0) / state.uncertainty_scale, 1.0, rtol=1e-4)


def test_platt_undoes_a_distortion_and_leaves_rare_signals_alone():
    rng = np.random.default_rng(0)
    x = rng.normal(size=20_000)
    label = rng.random(20_000) < expit(x)
    np.testing.assert_allclose(fitting.platt(2.0 * x + 1.0, label), [0.5, -0.5], atol=0.03)
    slope, offset = fitting.platt(x[:20] - 6.0, np.zeros(20))  # twenty rows, and nothing happened in them
    assert abs(slope - 1.0) < 0.05 and abs(offset) < 0.05
    model = LogisticRegression(C=1e6).fit(x[:500, None], label[:500])
    ours = fitting.platt(np.repeat(x[:500], 40), np.repeat(label[:500], 40))  # where the prior weighs nothing
    np.testing.assert_allclose(ours, [model.coef_[0, 0], model.intercept_[0]], atol=0.01)
    upside_down = np.concatenate([label, ~label])  # and of weight 0
    weight = np.repeat([3.0, 0.0], len(x))
    np.testing.assert_allclose(
        fitting.platt(np.tile(x, 2), upside_down, weight), fitting.platt(x, label), rtol=0.0, atol=1e-3
    )


def test_calibration_is_measured_when_asked_for_and_moves_predictions(fitted, measured):
    config, state, _ = fitted
    batches, plain = measured
    np.testing.assert_array_equal(plain.calibration, [[np.ones(S - 1), np.zeros(S - 1)]])
    sure = jax.tree.map(lambda x: x, state)
    heads_of = sure.params["heads"]["params"]
    heads_of["prior"] = heads_of["prior"] + 1.0  # every chance is predicted too high
    calibrated = fitting.measure(sure, batches, WORLD_ITEMS, config, calibrate=True).calibration
    assert (np.asarray(calibrated)[0, 1, 0] < -0.3) and np.isfinite(calibrated).all()
    before, after, actual = [], [], []
    for batch in batches:
        out = predict(config, sure, batch, WORLD_ITEMS)
        shown = np.asarray(batch.loss_masks().exposure) > 0

        def at(x, shown=shown):
            return np.asarray(network.expected(CONFIG, x, state.scale))[:, :-1][shown][:, 0]

        before.append(at(out))
        after.append(at(network.calibrated(CONFIG, out, calibrated, batch.context)))
        actual.append(batch.feedback[:, :-1][shown][:, 0])
    before, after, actual = (np.concatenate(x).mean(dtype=np.float64) for x in (before, after, actual))
    assert abs(after - actual) < 0.01 < 0.05 < before - actual


def test_random_exposures_are_calibrated_apart(fitted, measured):
    """Half the requests say that they were exposed at random, and there every second click was lost."""
    config, state, _ = fitted
    two = dataclasses.replace(config, exposures=2)
    state = dataclasses.replace(state, calibration=jnp.concatenate([state.calibration] * 2))
    rng, batches = np.random.default_rng(0), []
    for batch in measured[0]:
        random = rng.random((len(batch.user_id), 1)) < 0.5
        context = np.asarray(batch.context).copy()
        context[..., 0] = random
        lost = random[..., None] & (rng.random(batch.feedback.shape[:-1]) < 0.5)
        feedback = np.asarray(batch.feedback) * np.where(lost[..., None], 0.0, 1.0).astype(np.float32)
        batches.append(dataclasses.replace(batch, context=context, feedback=feedback))
    found = fitting.measure(state, batches, WORLD_ITEMS, two, calibrate=True)
    assert found.calibration.shape == (2, 2, S - 1)
    by_kind: dict[bool, list] = {True: [], False: []}
    for batch in batches:
        out = network.calibrated(two, predict(two, state, batch, WORLD_ITEMS), found.calibration, batch.context)
        shown = np.asarray(batch.loss_masks().exposure) > 0
        clicks = np.asarray(network.expected(CONFIG, out, state.scale))[:, :-1, :, 0]
        for kind, gaps in by_kind.items():
            rows = shown & (batch.context[:, :-1, :1] == kind)
            gaps += list((clicks - batch.feedback[:, :-1, :, 0])[rows])
    means = {kind: float(np.mean(gaps)) for kind, gaps in by_kind.items()}
    assert max(map(abs, means.values())) < 0.03, means
    alone = fitting.measure(state, batches, WORLD_ITEMS, config, calibrate=True).calibration
    assert alone.shape == (1, 2, S - 1) and not np.allclose(alone[0], found.calibration[0])


@functools.partial(jax.jit, static_argnames="config")
def _uncertainty_of(config, state, batch, items):
    key = jax.random.fold_in(state.key, 2**32 - 1)
    return network.uncertainty(config, state, representation.gather(batch, items), key)


def _uncertainty(*args):
    return np.float64(_uncertainty_of(*args))


def test_residuals_by_hand(fitted, measured):
    """Their spread, and their quantiles among the exposures of like predictions."""
    config, state, _ = fitted
    batches, after = measured
    mean, error = [], []
    for batch in batches:
        predicted = np.float64(predict(config, state, batch, WORLD_ITEMS).extra[..., 0, :]).mean(axis=0)
        shown = batch.slate_mask & batch.mask[..., None] & (np.arange(T + 1) < T)[:, None]
        mean.append(predicted[shown])
        error.append(np.log1p(np.float64(batch.feedback[..., WATCH]))[shown] - predicted[shown])
    mean, error = np.concatenate(mean), np.concatenate(error)
    assert float(after.residual[0]) == pytest.approx(error.std(), rel=1e-4)
    places = np.arange(1, network.BINS) / network.BINS
    np.testing.assert_allclose(after.edges[0], np.quantile(mean, places), rtol=1e-4)
    order = np.argsort(mean)
    assert after.quantiles.shape == (1, network.BINS, network.QUANTILES)
    assert (np.diff(after.quantiles, axis=2) >= 0).all()
    size = len(mean) / network.BINS
    for i in (0, 7, network.BINS - 1):
        inside = error[order[int(i * size) : int((i + 1) * size)]]  # to one exposure, where they do not divide
        assert np.abs(after.quantiles[0, i, 32] - np.median(inside)) < 0.1
        assert after.quantiles[0, i, 0] >= error.min() - 1e-4 and after.quantiles[0, i, -1] <= error.max() + 1e-4
    assert float(after.quantiles[0, :, -1].max()) == pytest.approx(error.max(), rel=1e-4)
    assert float(after.quantiles[0, :, 0].min()) == pytest.approx(error.min(), rel=1e-4)
    for name in ("params", "tables", "optimizer", "step", "scale", "calibration"):
        assert not tiny.differences(getattr(state, name), getattr(after, name))
