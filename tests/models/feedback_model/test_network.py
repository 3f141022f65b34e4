"""The twins of the feedback model: apart in all they learn, averaged where they predict, compared where they doubt."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import expit, rel_entr

from mmrf_jax.models import embeddings, heads, representation
from mmrf_jax.models.feedback_model import network
from mmrf_jax.signals import SHORT_VIDEO

CONFIG, S, WATCH = tiny.FEEDBACK, tiny.S, SHORT_VIDEO.index("watch_time")
STILL = dataclasses.replace(CONFIG, dropout=0.0, twin_feature_dropout=(0.0, 0.0))


def random_prediction(rng, *shape, videos=5) -> heads.Prediction:
    """Of both twins, with batch axes `shape`."""

    def normal(*s):
        return jnp.asarray(rng.normal(size=(2, *shape, *s)), jnp.float32)

    return heads.Prediction(normal(S, videos), 2.0 + normal(1, videos), normal(), normal(videos))


@pytest.fixture(scope="module")
def items():
    return tiny.make_items()


@pytest.fixture(scope="module")
def unseen():
    return tiny.make_batch().candidates[..., -2:]


@functools.partial(jax.jit, static_argnames="config")
def predict(config, params, rows, inputs, key=None):
    r = network.encode(config, params, rows, inputs, key)
    return network.predict(config, params, r.z, r.memory_mean, jnp.concatenate([r.shown, r.unseen], axis=-2))


@functools.partial(jax.jit, static_argnames="config")
def uncertainty(config, state, batch, items, key, unseen=None):
    return network.uncertainty(config, state, representation.gather(batch, items, unseen), key)


def equal_twins(state):
    """The state whose second twin is the first."""

    def double(x):
        return jnp.stack([x[0], x[0]])

    def halves(t):
        return t.replace(rows=jnp.tile(t.rows[:, : t.rows.shape[1] // 2], (1, 2)))

    return state.replace(
        params=jax.tree.map(double, state.params), tables={name: halves(t) for name, t in state.tables.items()}
    )


def test_rows_of_the_twins_stand_side_by_side():
    rows = np.arange(24.0).reshape(2, 3, 4)
    apart = network.twin_rows({"id": jnp.asarray(rows)})["id"]
    np.testing.assert_array_equal(apart, [rows[..., :2], rows[..., 2:]])
    state = tiny.make_feedback_model()
    for name, dim in CONFIG.table_dims.items():
        assert state.tables[name].dim == 2 * dim
        first, second = np.split(np.asarray(state.tables[name].rows), 2, axis=1)
        assert (first != second).any(axis=1).all()
    for path, x in jax.tree.leaves_with_path(state.params):
        if any(name in jax.tree_util.keystr(path) for name in ("prior", "ceiling")):
            continue  # both start from what is known, or assumed, of the log
        assert (np.asarray(x[0]) != np.asarray(x[1])).any(), path


def test_a_loss_of_one_twin_leaves_the_other_alone(items, unseen):
    """Parameters and halves of rows: the gradient of what one twin says is 0 to the other."""
    state, batch = tiny.make_feedback_model(), tiny.make_batch()
    inputs = representation.gather(batch, items, unseen)
    rows = embeddings.lookup(state.tables, inputs.ids)

    @jax.jit
    def gradient(twin):
        def loss(params, rows):
            out = predict.__wrapped__(CONFIG, params, rows, inputs, jax.random.key(0))
            return sum(jnp.sum(jnp.sin(x[twin])) for x in jax.tree.leaves(out))

        params, halves = jax.grad(loss, (0, 1))(state.params, rows)
        return params, network.twin_rows(halves)

    for twin in range(2):
        for path, leaf in jax.tree.leaves_with_path(gradient(twin)):
            assert np.abs(leaf[twin]).max() > 0, jax.tree_util.keystr(path)
            np.testing.assert_array_equal(leaf[1 - twin], 0.0, err_msg=jax.tree_util.keystr(path))


def test_twins_are_encoders_side_by_side(items):
    state, batch = tiny.make_feedback_model(), tiny.make_batch()
    inputs = representation.gather(batch, items)
    rows = embeddings.lookup(state.tables, inputs.ids)
    alone = jax.jit(representation.encode, static_argnums=0)
    both = jax.jit(network.encode, static_argnums=0)(CONFIG, state.params, rows, inputs)
    for twin in range(2):
        half = {name: np.split(np.asarray(row), 2, axis=-1)[twin] for name, row in rows.items()}
        encoder = jax.tree.map(lambda x, twin=twin: x[twin], state.params["encoder"])
        one = alone(CONFIG, encoder, half, inputs)
        assert max(tiny.differences(one, jax.tree.map(lambda x, twin=twin: x[twin], both)).values(), default=0) < 1e-5


def test_expected_is_the_mean_of_the_twins_probabilities():
    out = random_prediction(np.random.default_rng(0), 3, 2)
    scale = np.append(np.ones(S - 1), 20.0).astype(np.float32)
    got = np.asarray(network.expected(CONFIG, out, scale))
    assert got.shape == (3, 2, 5, S)
    raw = np.moveaxis(np.float64(out.feedback), -2, -1)
    np.testing.assert_allclose(got[..., :WATCH], expit(raw[..., :WATCH]).mean(axis=0), rtol=1e-5)  # one sigmoid
    np.testing.assert_allclose(got[..., WATCH], 20.0 * np.exp(raw[..., WATCH]).mean(axis=0), rtol=1e-5)
    assert (np.abs(got - expit(raw.mean(axis=0)))[..., :WATCH] > 1e-3).any()  # not the probability of the mean


def test_stay_probability_is_the_mean_of_the_twins():
    out = random_prediction(np.random.default_rng(1), 4)
    w = np.array([1.0, 0.0, 1.0, 0.0, 0.5], np.float32)
    got = network.continue_prob(out, jnp.broadcast_to(w, (4, 5)))
    logit = np.float64(out.continue_logit) + np.float64(out.continue_item_logit) @ np.float64(w)
    np.testing.assert_allclose(got, expit(logit).mean(axis=0), rtol=1e-5)


def test_divergence_is_the_mean_of_both_directions():
    out = random_prediction(np.random.default_rng(2), 3)
    got = np.asarray(network.divergence(CONFIG, out, jnp.full((1,), 0.8)))
    assert got.shape == (3, 5, S) and (got > 0).all()
    p, q = expit(np.moveaxis(np.float64(out.feedback), -2, -1)[..., :WATCH])

    def kl(p, q):
        return rel_entr(p, q) + rel_entr(1 - p, 1 - q)

    np.testing.assert_allclose(got[..., :WATCH], (kl(p, q) + kl(q, p)) / 2, rtol=1e-3, atol=1e-6)
    # Gaussians, by numerical integration.
    seconds = np.linspace(-12.0, 16.0, 40_001)

    def density(mean):
        return np.exp(-0.5 * ((seconds - mean) / 0.8) ** 2) / (0.8 * np.sqrt(2 * np.pi))

    for b, m in np.ndindex(3, 5):
        p, q = (density(mean) for mean in np.float64(out.extra)[:, b, 0, m])
        both = [np.trapezoid(rel_entr(x, y), seconds) for x, y in ((p, q), (q, p))]
        assert got[b, m, WATCH] == pytest.approx(np.mean(both), rel=1e-3, abs=1e-6)
    same = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), out)
    np.testing.assert_array_equal(network.divergence(CONFIG, same, jnp.full((1,), 0.8)), 0.0)


def test_twins_part_by_what_they_are_by_dropout_and_by_blindness(items):
    key, batch = jax.random.key(1), tiny.make_batch()
    state = tiny.make_feedback_model()
    same = equal_twins(state)
    np.testing.assert_allclose(uncertainty(STILL, same, batch, items, key), 0.0, atol=1e-9)
    by_themselves = np.asarray(uncertainty(STILL, state, batch, items, key))
    by_dropout = np.asarray(uncertainty(dataclasses.replace(STILL, dropout=0.2), same, batch, items, key))
    by_blindness = np.asarray(
        uncertainty(dataclasses.replace(STILL, twin_feature_dropout=(0.0, 0.5)), same, batch, items, key)
    )
    for u in (by_themselves, by_dropout, by_blindness):
        assert u.shape == (8, 5, 3, S) and (u >= 0).all() and (u.mean(axis=(0, 1, 2)) > 1e-5).all()


def test_predictions_have_no_dropout_and_uncertainty_has(items, unseen):
    state, batch = tiny.make_feedback_model(), tiny.make_batch()
    inputs = representation.gather(batch, items, unseen)
    rows = embeddings.lookup(state.tables, inputs.ids)
    still = predict(STILL, state.params, rows, inputs)
    assert not tiny.differences(predict(CONFIG, state.params, rows, inputs), still)
    drawn = [uncertainty(CONFIG, state, batch, items, jax.random.key(i), unseen) for i in (0, 0, 1)]
    assert drawn[0].shape == (8, 5, 5, S) and (np.asarray(drawn[0]) >= 0).all()
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (np.abs(np.asarray(drawn[0] - drawn[2])).max(axis=(0, 1)) > 0).all()  # shown and unseen, every signal


def test_uncertainty_is_the_mean_over_masks(items):
    state, batch, key = tiny.make_feedback_model(), tiny.make_batch(), jax.random.key(3)
    inputs = representation.gather(batch, items)
    rows = embeddings.lookup(state.tables, inputs.ids)
    each = [
        np.float64(network.divergence(CONFIG, predict(CONFIG, state.params, rows, inputs, k), state.residual))
        for k in jax.random.split(key, 3)
    ]
    got = uncertainty(dataclasses.replace(CONFIG, num_mc_dropout_samples=3), state, batch, items, key)
    np.testing.assert_allclose(got, np.mean(each, axis=0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": "hinge"},
        {"twin_feature_dropout": (0.1,)},
        {"twin_feature_dropout": (0.0, 1.0)},
        {"num_mc_dropout_samples": 0},
        {"dropout": 1.0},
    ],
)
def test_config_names_the_field_that_is_wrong(wrong):
    with pytest.raises(ValueError, match=f"feedback.{next(iter(wrong))}"):
        dataclasses.replace(CONFIG, **wrong)
