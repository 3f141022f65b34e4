"""Coverage, Gini and intra-list diversity against hand-computed arrays, in NumPy and in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax.metrics import diversity


def test_coverage_is_the_share_of_exposed_videos():
    assert diversity.coverage(np.array([0, 3, 1, 0])) == 0.5
    np.testing.assert_allclose(diversity.coverage(np.array([[0, 0], [1, 9]])), [0.0, 1.0])


def test_gini_of_known_distributions():
    assert diversity.gini(np.full(7, 3)) == pytest.approx(0.0, abs=1e-12)
    assert diversity.gini(np.array([0, 0, 0, 5])) == pytest.approx(0.75)
    # 1, 2, 3, 4: mean absolute difference of all 16 ordered pairs 1.25, divided by twice the mean 2.5.
    assert diversity.gini(np.array([3, 1, 4, 2])) == pytest.approx(0.25)
    assert diversity.gini(np.zeros(4)) == 0.0


def test_gini_does_not_depend_on_scale_or_order():
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, 50)
    assert diversity.gini(10 * rng.permutation(counts)) == pytest.approx(diversity.gini(counts))


def test_intra_list_diversity_by_hand():
    tags = np.array([[1, 1, 2], [1, 1, 1], [1, 2, 3], [4, 4, 5], [6, 6, 6]])
    mask = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
    # One pair of three alike; all alike; none alike; a hidden third video; a slate without pairs.
    np.testing.assert_allclose(diversity.intra_list_diversity(tags, mask), [2 / 3, 0, 1, 0, 0])
    np.testing.assert_allclose(diversity.intra_list_diversity(tags[:3]), [2 / 3, 0, 1])


def test_jax_under_jit_agrees_with_numpy():
    rng = np.random.default_rng(1)
    counts = rng.poisson(0.7, (3, 5000))
    tags, mask = rng.integers(0, 4, (2, 5, 6)), rng.random((2, 5, 6)) < 0.8
    for function, arguments in (
        (diversity.coverage, (counts,)),
        (diversity.gini, (counts,)),
        (diversity.intra_list_diversity, (tags, mask)),
    ):
        traced = jax.jit(function)(*map(jnp.asarray, arguments))
        assert isinstance(traced, jax.Array)
        np.testing.assert_allclose(traced, function(*arguments), rtol=1e-5, atol=1e-6)


def test_errors_name_the_thing():
    with pytest.raises(ValueError, match="mask"):
        diversity.intra_list_diversity(np.zeros((2, 3), int), np.ones(3, bool))
