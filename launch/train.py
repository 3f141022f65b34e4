"""Train a ranker and write its run folder. Re-running with the same --workdir resumes from the latest checkpoint.

  python -m launch.train --config=experiments/world.py --workdir=runs/world
  python -m launch.train --config=experiments/kuairand.py --config.data.dir=$KUAIRAND_DIR --workdir=runs/kuairand

The run folder holds config.json, metrics.jsonl, TensorBoard events, checkpoints/ and, at the end, results.json and
report.html.
"""

from launch import common

_CONFIG = common.define_config()
_WORKDIR = common.define_path("workdir", None, "Run folder.", required=True)


def main() -> None:
    from mmrf_jax.parallel import sharding
    from mmrf_jax.training import evaluate, train

    results = train.train(common.resolve_run(_CONFIG), _WORKDIR.value)
    if sharding.is_primary():
        evaluate.print_results(results)


if __name__ == "__main__":
    common.run(main, several=True, resumes=True)
