import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax.metrics import means

X = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, jnp.nan]])
MASK = jnp.array([[True, False, True], [False, True, False]])


def test_masked_mean_by_hand():
    assert means.masked_mean(X, MASK) == 3.0
    np.testing.assert_array_equal(jax.jit(means.masked_mean, static_argnames="axis")(X, MASK, axis=1), [2.0, 5.0])
    np.testing.assert_array_equal(means.masked_mean(X, MASK, axis=0), [1.0, 5.0, 3.0])
    np.testing.assert_array_equal(means.masked_sum(X, MASK, axis=1), [4.0, 5.0])
    assert means.masked_mean(X[:, :2], jnp.array([True, False])) == 2.5  # a mask that broadcasts counts in full


def test_empty_mask_is_zero_with_zero_gradient():
    nothing = jnp.zeros_like(MASK)
    assert means.masked_mean(X, nothing) == 0.0
    np.testing.assert_array_equal(jax.grad(means.masked_mean)(X, nothing), np.zeros((2, 3)))


def test_gradient_is_finite_where_masked_out():
    np.testing.assert_allclose(jax.grad(means.masked_mean)(X, MASK), np.where(MASK, 1 / 3, 0), rtol=1e-6)


def test_weighted_sums_add_up_over_batches():
    weights = jnp.array([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]])
    total, weight = means.weighted_sums(X, weights)
    parts = [means.weighted_sums(X[i], weights[i]) for i in range(2)]
    np.testing.assert_allclose(total, sum(p[0] for p in parts))
    np.testing.assert_allclose(means.ratio(total, weight), (1 + 6 + 2 + 5) / 4.5, rtol=1e-6)
    assert means.ratio(*means.weighted_sums(X, jnp.zeros(3))) == 0.0
    np.testing.assert_array_equal(means.weighted_sums(X, MASK, axis=1), [[4.0, 5.0], [2.0, 1.0]])
