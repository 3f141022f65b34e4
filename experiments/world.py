"""The main job: rounds of logs, feedback model and agents in the embedded world, then an A/B test against production.

  python -m launch.train --config=experiments/world.py --workdir=runs/world
  python -m launch.train --config=experiments/world.py --config.agents.ablation=da --workdir=runs/da
  python -m launch.train --config=experiments/world.py --config.method=myopic --workdir=runs/myopic
  python -m launch.train --config=experiments/world.py --config.quick=True --workdir=/tmp/look

Shows what agents that learn for the session gain over the production ranker, over a supervised ranker of the next
video's watch time (`method=myopic`), and over themselves without collaboration (`ablation=co`), without videos that
were not shown (`da`), or with a constant negative reward for those (`ns`).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mmrf_jax import types


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,  # of logs, initial parameters and A/B test; the world itself has world.seed
            "quick": False,  # a tiny form, for tests and first looks
            "source": "world",
            "method": "mmrf",  # or bc, wide_deep, deepfm, pareto, tscac, massa, td3_bc, iql, ltr, myopic
            "simulator": "world",  # or feedback: the feedback model of the run simulator_checkpoint answers
            "simulator_checkpoint": "",
            "simulator_answers": "sampled",  # or expected
            "world": {
                "num_videos": 100_000,
                "candidates": 100,  # C
                "slate": 6,  # K
                "history": 30,  # H
                "max_requests": 64,
                "seed": 0,
                "variant": "base",  # or the shifted worlds users and leaving, for testing only
            },
            "data": {
                "dir": "",  # logs of launch.collect to learn from; empty: collect them
                "stream": placeholder(bool),  # read as it is trained on, not held; where None, above 2^20 sessions
            },
            "collect": {"sessions": 8_192, "test_sessions": 4_096},  # the first for each round
            "alternation": {
                "rounds": 3,  # of fit, label, update
                "closed_loop": True,  # after the first round the newest policy serves and collects the round's log
                "temperature": 1.0,  # of that policy, as Plackett–Luce
                "gap_sessions": 2_048,  # served each round in the model and in the world, to compare; 0 for none
                "conflict_batches": 0,  # of each round, on which the agents' gradients are compared
            },
            "feedback": {  # the feedback fitting model
                "loss": "likelihood",  # or mse, as in the paper
                "dropout": 0.02,
                "blindness": (0.0, 0.0),  # (0.0, 0.25): uncertainty ranks errors better, and errors are larger
                "masks": 1,
                "learning_rate": 3e-3,
                "table_learning_rate": 0.02,
                "batch": 32,  # segments
                "epochs": 1,  # over each round's log
                "log_share": 1.0,  # of the log's sessions, to see what less would do
                "max_rows": placeholder(int),  # see agents
                "table_dtype": placeholder(str),
            },
            "agents": {
                "signals": types.AGENT_SIGNALS,
                "ablation": "none",  # or co: without collaboration; da: without videos not shown; ns: those get -1
                "watch_reward": "seconds",  # or long_view, or sum: of all signals' rewards
                "non_impressions": 0.25,  # rho
                "sampling": "uniform",  # of videos that were not shown; or score, or uncertainty: more of the highest
                "model_weight": 2.0 / 3.0,  # of the feedback model in Q, beside the critics
                "optimism": 0.0,  # beta
                "dim": 32,
                "id_dim": 8,
                "learning_rate": 1.5e-3,
                "actor_learning_rate": 3e-3,
                "table_learning_rate": 0.02,
                "temperature": 0.25,
                "polyak": 0.05,  # of the target networks
                "main_weight": 0.1,
                "dropout": 0.0,
                "score_hidden": placeholder(int),  # units of an MLP beside the products that score; None: none
                "max_rows": placeholder(int),  # of an embedding table, 2^27 where None; more ids share rows by hash
                "table_dtype": placeholder(str),  # of its rows, float32 where None; or bfloat16, for half the memory
            },
            "train": {"batch": 32, "segment": 8, "epochs": 1},  # batch in segments of 8 requests; epochs a round
            "ab_test": {
                "sessions": 20_000,
                "day": 0,
                "arms": ("production", "random", "oracle_myopic", "oracle_planning"),  # beside the trained ranker
            },
            "log_every": 50,
            "checkpoint_every": 200,
            "profile_steps": "",  # or FIRST:LAST, such as 100:110: a trace of these steps in the run folder
            "when_quick": {
                "world": {"num_videos": 5_000, "candidates": 40},
                "collect": {"sessions": 1_024, "test_sessions": 1_024},  # alike, so that both share one compilation
                "alternation": {"rounds": 2, "gap_sessions": 0},
                "ab_test": {"sessions": 512, "arms": ("production",)},
                "log_every": 5,
                "checkpoint_every": 10,
            },
        }
    )
