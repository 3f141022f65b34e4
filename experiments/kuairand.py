"""The same agents on real logs: KuaiRand, from the folder of its CSV files.

  python -m launch.train --config=experiments/kuairand.py --config.data.dir=$KUAIRAND_DIR --workdir=runs/kuairand

Shows GAUC per signal on the last days beside popularity and boosting, with and without the feedback of those days in
the users' histories. Sizes and the number of epochs were chosen on the validation day.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mmrf_jax import types


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "quick": False,
            "source": "kuairand",
            "method": "mmrf",  # or a baseline, see experiments/world.py
            "simulator": "world",  # real logs; or feedback: the feedback model of the run simulator_checkpoint answers
            "simulator_checkpoint": "",
            "simulator_answers": "sampled",  # or expected
            "data": {
                "dir": "",  # the folder with the CSV files, or its parent
                "cache_dir": "~/.cache/mmrf_jax/kuairand",  # prepared records go here
                "train_until": 20220502,  # last day of training
                "valid_until": 20220503,
                "test_from": 20220504,
                "candidates": 100,
                "slate": 6,
                "history": 32,
                "session_gap_minutes": 0.0,  # 0: a day for Pure, half an hour for 1K and 27K
                "request_gap_minutes": 30.0,
                "max_sessions": 0,  # 0: all
                "stream": placeholder(bool),  # read as it is trained on, not held; where None, above 2^20 sessions
                "served": placeholder(str),  # feedback log of launch.serve, to learn from instead of the training days
            },
            "agents": {
                "signals": types.AGENT_SIGNALS,
                "ablation": "none",
                "non_impressions": 0.25,
                "sampling": "uniform",
                "model_weight": 0.0,  # its rows of users are not the actors', which then follow it less well
                "optimism": 0.0,
                "dim": 48,
                "id_dim": 16,
                "user_dim": 16,
                "learning_rate": 1e-3,
                "actor_learning_rate": 6e-3,
                "table_learning_rate": 0.03,
                "temperature": 0.25,
                "polyak": 0.02,
                "watch_reward": "long_view",  # sessions of Pure are too short for seconds and their noise
                "main_weight": 0.1,
                "dropout": 0.2,
                "signal_weights": (1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0, 0.1),  # long plays are rare and large
                "score_hidden": placeholder(int),  # units of an MLP beside the products that score; None: none
                "max_rows": placeholder(int),  # of an embedding table, 2^27 where None; more ids share rows by hash
                "table_dtype": placeholder(str),  # of its rows, float32 where None; or bfloat16, for half the memory
            },
            "alternation": {
                "rounds": 3,
                "closed_loop": False,
                "temperature": 1.0,
                "gap_sessions": 0,
                "conflict_batches": 0,
            },
            "feedback": {
                "loss": "likelihood",
                "dim": 48,
                "id_dim": 16,
                "user_dim": 16,
                "dropout": 0.4,
                "blindness": (0.0, 0.0),
                "masks": 1,
                "learning_rate": 1e-3,
                "table_learning_rate": 0.03,
                "batch": 128,
                "epochs": 1,  # a round
                "log_share": 1.0,
                "signal_weights": (1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0, 0.1),
                "max_rows": placeholder(int),  # see agents
                "table_dtype": placeholder(str),
            },
            "train": {"batch": 128, "segment": 4, "epochs": 1},  # epochs a round
            "collect": {"sessions": 8_192},  # where the feedback model of another run is the simulator
            "ab_test": {"sessions": 20_000, "day": 0, "arms": ("logged", "random")},
            "log_every": 50,
            "checkpoint_every": 200,
            "profile_steps": "",  # or FIRST:LAST, such as 100:110: a trace of these steps in the run folder
            "when_quick": {
                "data": {"max_sessions": 2_000},
                "alternation": {"rounds": 1},
                "log_every": 2,
                "checkpoint_every": 5,
            },
        }
    )
