"""Train on your own log: one row per shown item, and a file that says what the columns mean.

  mmrf train --config=logs --config.data.path='logs/*.parquet' --config.data.schema=schema.py \
    --config.data.item_table=items.parquet --workdir=runs/mine

docs/own-data.md explains the schema; `mmrf check-data` with the same config prints what would be assumed.
"""

from ml_collections import ConfigDict

from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.training import config_sections, configs


def get_config() -> ConfigDict:
    run = configs.Run(
        source="logs",
        world=None,
        data=config_sections.OwnLogs(),
        agents=AgentConfig(dropout=0.2, residual_actor=True),
        alternation=config_sections.Alternation(rounds=1, closed_loop=False),
        feedback=config_sections.Feedback(dropout=0.2),
        train=config_sections.Train(segment=4),
        ab_test=config_sections.ABTest(arms=()),
    )
    return configs.to_config_dict(
        run,
        without=("collect.test_sessions", "agents.signal_weights", "feedback.signal_weights"),
        when_quick={"log_every": 2, "checkpoint_every": 5},
    )
