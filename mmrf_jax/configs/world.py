"""The main job: rounds of logs, feedback model and agents in the embedded world, then an A/B test against production.

  mmrf train --config=world --workdir=runs/world
  mmrf train --config=world --config.agents.ablation=no_augmentation --workdir=runs/da
  mmrf train --config=world --config.method=myopic --workdir=runs/myopic
  mmrf train --config=world --config.quick=True --workdir=runs/look

Measures the gain of agents that optimise the session over the production ranker, over a supervised ranker of the next
video's watch time (`method=myopic`), and over the same agents without collaboration (`ablation=no_collaboration`),
without counterfactual slates (`no_augmentation`), or with a constant negative reward for those (`constant_negative`).

The defaults in mmrf_jax/training/config_sections.py, which gives every field's range and meaning, are those of this
job, but for the rate of the embedding rows.
"""

from ml_collections import ConfigDict

from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.training import configs

_ROWS = 0.2  # a video has some tens of exposures to learn from
#: Fields without effect here: the world has no per-user embeddings, and signals and sizes are the defaults.
WITHOUT = (
    "agents.user_dim",
    "agents.signal_weights",
    "feedback.dim",
    "feedback.id_dim",
    "feedback.user_dim",
    "feedback.signal_weights",
)


def get_config() -> ConfigDict:
    return configs.to_config_dict(
        configs.Run(
            agents=AgentConfig(table_learning_rate=_ROWS), feedback=configs.Feedback(table_learning_rate=_ROWS)
        ),
        without=WITHOUT,
        when_quick={
            "world": {"num_videos": 5_000, "candidates": 40},
            "collect": {"sessions": 1_024, "test_sessions": 1_024},  # equal, so that both share one compilation
            "alternation": {"rounds": 2},
            "ab_test": {"sessions": 512, "arms": ("production",)},
            "log_every": 5,
            "checkpoint_every": 10,
        },
    )
