"""Assignment by hash is uniform, independent and for ever; a sample ratio that is wrong is found."""

import numpy as np
import pytest

from mmrf_jax.abtest import assignment


def test_assignment_is_uniform_and_belongs_to_the_user_alone():
    users = np.arange(200_000)
    arms = assignment.assign(users, [0.5, 0.3, 0.2], "ranker")
    assert assignment.sample_ratio_mismatch(np.bincount(arms), [0.5, 0.3, 0.2]) > 0.01
    order = np.random.default_rng(0).permutation(200_000)
    np.testing.assert_array_equal(
        assignment.assign(users[order].astype(np.int32), [0.5, 0.3, 0.2], "ranker"), arms[order]
    )
    np.testing.assert_array_equal(assignment.assign(users[17:18], [0.5, 0.3, 0.2], "ranker"), arms[17:18])
    other = assignment.assign(users, [0.5, 0.3, 0.2], "page")
    table = np.bincount(3 * arms + other, minlength=9)
    expected = np.outer([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]).reshape(-1)
    assert assignment.sample_ratio_mismatch(table, expected) > 0.01  # experiments do not see each other
    in_a_row = np.bincount(2 * (arms[1:] == 0) + (arms[:-1] == 0))
    assert assignment.sample_ratio_mismatch(in_a_row, [0.25] * 4) > 0.01  # nor do neighbouring ids


def test_assignment_never_changes():
    assert assignment._splitmix64(np.zeros(1, np.uint64))[0] == 0xE220A8397B1DCDAF  # of the reference code, seed 0
    expected = [0, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0, 1]
    np.testing.assert_array_equal(assignment.assign(np.arange(12), [0.5, 0.5], "ranker"), expected)


def test_sample_ratio_mismatch_is_found():
    assert assignment.sample_ratio_mismatch([5000, 5000], [0.5, 0.5]) == 1.0
    assert assignment.sample_ratio_mismatch([50_000, 49_000], [0.5, 0.5]) < 0.002  # 1 % of one arm lost
    assert assignment.sample_ratio_mismatch([5100, 4900], [1, 1]) == pytest.approx(0.0455, abs=1e-4)  # z = 2
    rng = np.random.default_rng(0)
    values = [
        assignment.sample_ratio_mismatch(rng.multinomial(900, [0.2, 0.3, 0.5]), [0.2, 0.3, 0.5]) for _ in range(2000)
    ]
    np.testing.assert_allclose(np.quantile(values, [0.05, 0.5, 0.9]), [0.05, 0.5, 0.9], atol=0.04)


def test_errors_name_the_thing():
    with pytest.raises(ValueError, match="add up to 1"):
        assignment.assign(np.arange(3), [0.5, 0.4], "")
    with pytest.raises(ValueError, match="must be integers, got float64"):
        assignment.assign(np.zeros(3), [1.0], "")
    with pytest.raises(ValueError, match="one number for each arm"):
        assignment.sample_ratio_mismatch([3, 4], [1.0])
