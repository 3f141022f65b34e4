"""The main job: learn from production's logs in the embedded world, then an A/B test against production.

  python -m launch.train --config=experiments/world.py --workdir=runs/world
  python -m launch.train --config=experiments/world.py --config.method=myopic --workdir=runs/myopic
  python -m launch.train --config=experiments/world.py --config.quick=True --workdir=/tmp/look

Shows what agents that learn for the session gain over the production ranker, and over a supervised ranker of the next
video's watch time that learns from the same logs (`method=myopic`).
"""

from ml_collections import ConfigDict

from mmrf_jax import types


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,  # of logs, initial parameters and A/B test; the world itself has world.seed
            "quick": False,  # a tiny form, for tests and first looks
            "source": "world",
            "method": "mmrf",  # or myopic
            "world": {
                "num_videos": 100_000,
                "candidates": 100,  # C
                "slate": 6,  # K
                "history": 30,  # H
                "max_requests": 64,
                "seed": 0,
                "variant": "base",  # or the shifted worlds users and leaving, for testing only
            },
            "data": {"dir": ""},  # logs of launch.collect to learn from; empty: collect them
            "collect": {"sessions": 49_152, "test_sessions": 4_096},
            "agents": {
                "signals": types.AGENT_SIGNALS,
                "ablation": "none",  # or co: without collaboration
                "dim": 32,
                "id_dim": 8,
                "learning_rate": 1.5e-3,
                "actor_learning_rate": 3e-3,
                "table_learning_rate": 0.02,
                "temperature": 0.25,
                "main_weight": 0.1,
                "dropout": 0.0,
            },
            "train": {"batch": 128, "segment": 8, "epochs": 2},  # batch in segments of that many requests
            "ab_test": {
                "sessions": 20_000,
                "day": 0,
                "arms": ("production", "random", "oracle_myopic", "oracle_planning"),  # beside the trained ranker
            },
            "log_every": 50,
            "checkpoint_every": 200,
            "when_quick": {
                "world": {"num_videos": 5_000, "candidates": 40},
                "collect": {"sessions": 1_024, "test_sessions": 1_024},  # alike, so that both share one compilation
                "train": {"batch": 64, "epochs": 1},
                "ab_test": {"sessions": 512, "arms": ("production",)},
                "log_every": 5,
                "checkpoint_every": 10,
            },
        }
    )
