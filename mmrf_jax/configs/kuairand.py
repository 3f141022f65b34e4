"""MMRF's agents on real logs: KuaiRand, from the folder of its CSV files.

  mmrf train --config=kuairand --config.data.dir=$KUAIRAND_DIR --workdir=runs/kuairand

Compares GAUC per signal on the last days with popularity and boosting, with and without the feedback of those days in
the users' histories. Sizes and the number of epochs were chosen on the validation day.
"""

from typing import Any

from ml_collections import ConfigDict

from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.training import config_sections, configs

_SIZES: Any = {"dim": 48, "id_dim": 16, "user_dim": 16, "learning_rate": 1e-3, "table_learning_rate": 0.03}
_WEIGHTS = (1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0, 0.1)  # long plays are rare and large


def get_config() -> ConfigDict:
    run = configs.Run(
        source="kuairand",
        world=None,
        data=config_sections.KuaiRandData(),
        agents=AgentConfig(
            **_SIZES,
            signal_weights=_WEIGHTS,
            model_weight=0.0,  # its user embeddings differ from the actors', which would then follow it less well
            actor_learning_rate=6e-3,
            polyak=0.02,
            reward="long_view",  # Pure's sessions are too short for watch time in seconds, which is noisy
            dropout=0.2,
            residual_actor=True,
            discount=0.0,  # Pure has only a few videos per feed, so a session's end there says little about the user
        ),
        alternation=config_sections.Alternation(rounds=1, closed_loop=False),  # three overfit: chosen on 05-03
        feedback=config_sections.Feedback(**_SIZES, signal_weights=_WEIGHTS, dropout=0.4, batch=128),
        train=config_sections.Train(batch=128, segment=4),
        ab_test=config_sections.ABTest(arms=("logged", "random")),
    )
    return configs.to_config_dict(
        run,
        without=("collect.test_sessions",),  # the test days are the held-out log
        when_quick={
            "data": {"max_sessions": 2_000},
            "log_every": 2,
            "checkpoint_every": 5,
        },
    )
