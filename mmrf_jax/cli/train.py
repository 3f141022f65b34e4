"""Train a ranker and write its run folder. Re-running with the same --workdir resumes from the latest checkpoint.

  mmrf train --config=world --workdir=runs/world
  mmrf train --config=kuairand --config.data.dir=$KUAIRAND_DIR --workdir=runs/kuairand

The run folder holds config.json, metrics.jsonl, metrics.csv, TensorBoard events, checkpoints/ and, at the end,
results.json and report.html. The last line printed is the verdict: better, worse or not distinguishable from
production.
"""

from mmrf_jax.cli import common

_CONFIG = common.define_config()
_WORKDIR = common.define_path("workdir", None, "Run folder.", required=True)


def main() -> None:
    from mmrf_jax.parallel import sharding
    from mmrf_jax.report import verdict
    from mmrf_jax.training import configs, evaluate, train

    config = common.resolve_run(_CONFIG)
    results = train.train(config, _WORKDIR.value)
    if sharding.is_primary():
        evaluate.print_results(results)
        print(f"\n{verdict.of_run(results, configs.as_dict(config)).sentence}")


def run() -> None:
    """Run this command."""
    common.run(main, several=True, resumes=True)
