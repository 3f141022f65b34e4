"""The optimiser of parameters: what is clipped together, and at which learning rate."""

import dataclasses

import jax
import numpy as np
import pytest

from mmrf_jax.models.encoder_config import EncoderConfig
from mmrf_jax.models.optimization import make_optimizer

CONFIG = EncoderConfig(learning_rate=0.1, weight_decay=0.25)
PARAMS = {name: np.array([1.0, 2.0], np.float32) for name in ("encoder", "critic", "actor")}
GRADS = {"encoder": [0.3, 0.0], "critic": [0.0, 4.0], "actor": [12.0, -5.0]}
GRADS = {name: np.array(grad, np.float32) for name, grad in GRADS.items()}


def first_moments(state) -> dict[str, np.ndarray]:
    """Tenths of the clipped gradients, after one step."""
    found = jax.tree.leaves_with_path(state)
    names = [(jax.tree_util.keystr(path), x) for path, x in found]
    return {name: x for name in PARAMS for path, x in names if ".mu" in path and path.endswith(f"['{name}']")}


@pytest.mark.parametrize("actor_learning_rate", [None, 0.3])
def test_first_step_of_adam_by_hand(actor_learning_rate):
    optimizer = make_optimizer(CONFIG, actor_learning_rate)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    norms = dict.fromkeys(PARAMS, np.sqrt(0.3**2 + 4.0**2 + 13.0**2))
    if actor_learning_rate is not None:
        norms = {"encoder": np.hypot(0.3, 4.0), "critic": np.hypot(0.3, 4.0), "actor": 13.0}
    moments = first_moments(state)
    for name, grad in GRADS.items():
        np.testing.assert_allclose(moments[name], 0.1 * grad / norms[name], rtol=1e-5, err_msg=name)
        rate = actor_learning_rate if name == "actor" and actor_learning_rate else 0.1
        by_hand = -rate * (np.sign(grad) + 0.25 * PARAMS[name])  # Adam's first step has size 1
        np.testing.assert_allclose(updates[name], by_hand, rtol=1e-4, err_msg=name)


def test_sgd_is_plain():
    optimizer = make_optimizer(dataclasses.replace(CONFIG, optimizer="sgd"), 0.3)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    for name, grad in GRADS.items():
        np.testing.assert_allclose(updates[name], -0.1 * grad, rtol=1e-6)
