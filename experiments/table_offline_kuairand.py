"""All methods on KuaiRand's test days and on their random log: GAUC, and NCIS of the stochastic rankers.

  mmrf sweep --config=experiments/table_offline_kuairand.py --config.run.data.dir=$KUAIRAND_DIR \\
      --out=experiments/results/table_offline_kuairand
"""

from experiments import kuairand, table_ab
from mmrf_jax.training import config_sections, configs


def get_config():
    run = kuairand.get_config()
    return configs.to_config_dict(
        config_sections.Study(tables=("offline", "offline_frozen", "offline_random")),
        without=("arms", "sessions", "days"),  # these belong to A/B tests
        run=run,
        variants={"mmrf": {}, **{name: {"method": name} for name in table_ab.BASELINES}},
        when_quick={"run": {**run.when_quick.to_dict(), "quick": True}, "seeds": 1},
    )
