"""Updates on some of the candidates of each request."""

import jax
import numpy as np
import pytest
import tiny

from experiments import world
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import configs, steps

C, OTHERS = tiny.SPEC.candidates, 2


def test_what_was_shown_stays_and_the_others_are_drawn_from_the_rest():
    batch = tiny.make_batch()
    fewer = jax.jit(steps.with_fewer_candidates, static_argnums=2)
    drawn = np.zeros(C)
    for seed in range(300):
        found = jax.device_get(fewer(batch, jax.random.key(seed), OTHERS))
        k = batch.slate.shape[-1]
        assert found.candidates.shape == (*batch.candidates.shape[:2], k + OTHERS)
        shown, before = (np.take_along_axis(b.candidates, b.slate, axis=-1) for b in (found, batch))
        np.testing.assert_array_equal(shown[batch.slate_mask], before[batch.slate_mask])
        assert (np.diff(np.sort(found.candidates, axis=-1), axis=-1) > 0).all()  # none twice
        assert np.isin(found.candidates[0, 0], batch.candidates[0, 0]).all()
        drawn += np.isin(batch.candidates[0, 0], found.candidates[0, 0])
    shown = np.isin(np.arange(C), batch.slate[0, 0][batch.slate_mask[0, 0]])
    np.testing.assert_array_equal(drawn[shown], 300)
    share = (batch.slate.shape[-1] + OTHERS - shown.sum()) / (C - shown.sum())
    np.testing.assert_allclose(drawn[~shown] / 300, share, atol=4 * np.sqrt(share * (1 - share) / 300))


def test_those_that_are_left_stand_for_all():
    batch = tiny.make_batch()
    found = jax.device_get(steps.with_fewer_candidates(batch, jax.random.key(0), OTHERS))
    np.testing.assert_allclose(found.weight.sum(axis=-1), C, rtol=1e-6)
    at = np.take_along_axis(found.weight, found.slate, axis=-1)
    np.testing.assert_array_equal(at[batch.slate_mask], 1.0)
    shown = np.zeros(found.weight.shape, bool)
    np.put_along_axis(shown, np.where(batch.slate_mask, found.slate, found.slate[..., :1]), True, axis=-1)
    others = np.where(batch.slate_mask.any(axis=-1, keepdims=True), ~shown, True)
    assert (found.weight[others] >= 1.0).all()
    for row, other in zip(
        found.weight.reshape(-1, found.weight.shape[-1]), others.reshape(-1, others.shape[-1]), strict=False
    ):
        assert len(np.unique(row[other])) == 1


def test_everything_else_of_the_batch_is_as_it_was():
    batch = tiny.make_batch()
    found = steps.with_fewer_candidates(batch, jax.random.key(0), OTHERS)
    for name in ("user_id", "profile", "context", "slate_mask", "feedback", "mask", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(batch, name))


@pytest.mark.parametrize(
    ("given", "candidates", "others"),
    [
        ({}, 100, 32),
        ({}, 40, None),  # less than a quarter would be left out
        ({"train.candidates": 0}, 100, None),
        ({"train.candidates": 4}, 100, 18),  # three simulated slates of six
        ({"agents.sampling": "score"}, 100, None),
        ({"method": "pareto"}, 100, None),  # without a feedback model
    ],
)
def test_how_many_others_an_update_looks_at(given, candidates, others):
    config = world.get_config()
    config.world.candidates = candidates
    config.update_from_flattened_dict(given)
    assert steps.plan_of(configs.run_of(config.to_dict()), SHORT_VIDEO).others == others
