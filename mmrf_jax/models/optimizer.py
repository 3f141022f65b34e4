"""The optimiser of Flax parameters; embedding tables have their own (`models.rowwise`)."""

from __future__ import annotations

import optax

from mmrf_jax.models.encoder_config import EncoderConfig


def make_optimizer(config: EncoderConfig, actor_learning_rate: float | None = None) -> optax.GradientTransformation:
    """Return Adam with decoupled weight decay and the gradient clipped to norm 1; plain SGD for tests of invariance.

    Args:
      actor_learning_rate: of parameters {"encoder", "critic", "actor"}: Adam's learning rate for the actor, whose
        gradient is then clipped separately. None if all parameters are optimised together.
    """
    if config.optimizer == "sgd":
        return optax.sgd(config.learning_rate)
    together = _adam(config.learning_rate, config.weight_decay)
    if actor_learning_rate is None:
        return together
    labels = {"encoder": "critic", "critic": "critic", "actor": "actor"}
    return optax.multi_transform({"critic": together, "actor": _adam(actor_learning_rate, config.weight_decay)}, labels)


def _adam(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=weight_decay))
