"""A method that is not in the package: MMRF with one more term in the loss of its actors.

  python examples/own_method.py
  mmrf train --import=own_method --config=world --config.method=calm --workdir=runs/calm

The script trains a tiny run and prints its A/B test. The command, run in the folder of this file, trains the main job.
The term keeps the scores small: with large scores the policy that collects the next log, Plackett–Luce on the scores,
explores little. A plain function is an arm of the A/B test. docs/own-method.md explains the parts.
"""

import functools

import jax.numpy as jnp

import mmrf_jax as mmrf
from mmrf_jax.agents.mmrf import losses, training_step

WEIGHT = 0.01


def actor_loss(b: losses.ActorBatch, temperature: float):
    """Compute MMRF's actor loss plus the mean square of the scores."""
    loss, metrics = losses.actor_loss(b, temperature)
    size = b.mean(jnp.mean(b.scores**2, axis=(-2, -1)))
    return loss + WEIGHT * size, metrics | {"loss/size": size}


def popular(key, obs):
    """Rank by popularity, the last of the world's item features: scores [B, C] of an observation."""
    return obs.features[..., -1]


METHOD = mmrf.Method(
    functools.partial(training_step.update, algorithm=training_step.Algorithm(actor_loss)), uses_model=True
)
mmrf.register_method("calm", METHOD)
mmrf.register_policy("popular", popular)

TINY = {
    "quick": True,
    "method": "calm",
    "world": {"num_videos": 1_000, "candidates": 20},
    "collect": {"sessions": 200, "test_sessions": 200},
    "ab_test": {"sessions": 64, "arms": ("production", "popular")},
}

if __name__ == "__main__":
    run = mmrf.train("world", workdir="runs/own_method", overrides=TINY)
    for arm, metrics in run.results["ab_test"].items():
        print(f"{arm}: {metrics['watch_time']['mean']:.0f} s per session")
    print("best two:", run.rank(candidates=[7, 42, 99, 512], k=2))
