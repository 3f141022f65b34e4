"""Every method by its name: it learns, serves and scores; ablations only where there is something to take."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from mmrf_jax import types
from mmrf_jax.agents import registry

#: Those have tests of all of this in files of their own, or whole runs.
ELSEWHERE = {"mmrf", "myopic", "wide_deep", "deepfm", "ltr"}


@pytest.mark.parametrize("name", sorted(set(registry.METHODS) - ELSEWHERE))
def test_trains_and_serves(name):
    method = registry.get(name)
    config = registry.configured(name, tiny.CONFIG)
    items, batch = tiny.make_items(), tiny.make_batch()
    state = tiny.make_state(config)
    after, metrics = tiny.learner(name)(state, batch, items, config=config)
    assert all(np.isfinite(x) for x in metrics.values())
    assert tiny.differences(state.params, after.params)
    columns = registry.score_candidates(after, batch, items, config, name)
    assert columns.shape == (8, 5, len(method.signals(config)), 8) and np.isfinite(columns).all()
    served = method.make_policy(after, items, config, 0.5)
    request = types.Request(batch.user_id, batch.profile, batch.context[:, 0], batch.candidates[:, 0])

    @jax.jit
    def serve(params, request, history):
        return served.score(params, served.start(params, request, history), request)

    scores = serve(served.params, request, batch.history)
    assert scores.shape == batch.candidates[:, 0].shape and np.asarray(scores).std(axis=-1).min() > 0.0


def test_ablations_of_what_a_method_does_not_have_are_refused():
    for name in ("iql", "ltr", "td3_bc"):
        with pytest.raises(
            ValueError, match=f"'no_augmentation' takes away what method '{name}' does not have; leave it at 'none'"
        ):
            registry.configured(name, dataclasses.replace(tiny.CONFIG, ablation="no_augmentation"))
    with pytest.raises(ValueError, match="method 'massa' does not have"):
        registry.configured("massa", dataclasses.replace(tiny.CONFIG, ablation="no_collaboration"))
    assert (
        registry.configured("massa", dataclasses.replace(tiny.CONFIG, ablation="no_augmentation")).ablation
        == "no_augmentation"
    )
    assert (
        registry.configured("mmrf", dataclasses.replace(tiny.CONFIG, ablation="no_collaboration")).ablation
        == "no_collaboration"
    )


def test_unknown_method_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown method 'sac'.*mmrf, bc, wide_deep"):
        registry.get("sac")
