"""Gradients of single agents on what they share add up to the step that training takes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny import CONFIG, SGD, make_batch, make_items, make_shapes, make_state, sgd_step

from mmrf_jax import types
from mmrf_jax.agents.mmrf import diagnostics
from mmrf_jax.signals import SHORT_VIDEO


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def step():
    """(state, batch, what one update of plain gradient descent without projection added to each parameter).

    Of signals without an agent nothing is learned, so the losses of the agents are all that teach the encoder.
    """
    state, batch = make_state(SGD), make_batch()
    weights = tuple(w * (name in SGD.signals) for name, w in zip(SHORT_VIDEO.names, SGD.loss_weights, strict=True))
    after, _ = sgd_step(state, batch, make_items(), projection=0.0, signal_weights=weights)
    return state, batch, jax.tree.map(lambda a, b: a - b, *jax.device_get((after.params, state.params)))


def test_objectives_of_all_actors_make_the_step_of_the_attention(step):
    state, batch, moved = step
    rows = np.asarray(diagnostics.actor_gradients(state, batch, make_items(), None, SGD))
    assert rows.shape[0] == SGD.num_agents and (np.linalg.norm(rows, axis=1) > 0).all()
    wanted = SGD.learning_rate * rows.sum(axis=0) / batch.mask[:, :-1].sum()
    found = flat(moved["actor"]["params"]["collaboration"])
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-6)


def test_losses_of_all_critics_make_the_step_of_the_encoder(step):
    state, batch, moved = step
    rows = np.asarray(diagnostics.encoder_gradients(state, batch, make_items(), SGD))
    weights = np.asarray(SGD.loss_weights)[[i for ((i, _),) in SGD.reward_terms]]
    exposed = (batch.slate_mask & batch.mask[..., None])[:, :-1].sum()
    wanted = SGD.learning_rate * (weights[:, None] * rows).sum(axis=0) / exposed
    np.testing.assert_allclose(flat(moved["encoder"]), wanted, rtol=2e-3, atol=1e-6)


def test_attention_is_shared_out_among_the_others():
    batch = make_batch()
    total = np.asarray(diagnostics.attention(make_state(), batch, make_items(), CONFIG))
    n = CONFIG.num_agents
    assert total.shape == (CONFIG.heads, n, n)
    np.testing.assert_allclose(total.sum(axis=-1), batch.mask[:, :-1].sum(), rtol=1e-5)
    assert (np.diagonal(total, axis1=1, axis2=2) == 0).all()


def test_without_collaboration_actors_share_nothing():
    config = dataclasses.replace(CONFIG, ablation="no_collaboration")
    gradients = functools.partial(diagnostics.actor_gradients, predicted=None, config=config)
    with pytest.raises(ValueError, match="no_collaboration with 3 agents has no attention"):
        jax.eval_shape(gradients, make_shapes(config), make_batch(), make_items())


def test_what_a_model_says_of_the_candidates_moves_the_actors():
    batch, state = make_batch(), make_state()
    shape = batch.candidates.shape
    rng = np.random.default_rng(0)
    said = types.FeedbackPrediction(
        rng.normal(size=(*shape[:2], len(SHORT_VIDEO), shape[2])).astype(np.float32),
        np.zeros(shape[:2], np.float32),
        np.zeros(shape, np.float32),
    )
    deaf = dataclasses.replace(CONFIG, model_weight=0.0)
    own, blended = (diagnostics.actor_gradients(state, batch, make_items(), said, c) for c in (deaf, CONFIG))
    assert not np.allclose(own, blended)
