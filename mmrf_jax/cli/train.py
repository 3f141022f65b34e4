"""Train a ranker and write its run folder. Re-running with the same --workdir resumes from the latest checkpoint.

  mmrf train --config=world --workdir=runs/world
  mmrf train --config=kuairand --config.data.dir=$KUAIRAND_DIR --workdir=runs/kuairand

The run folder holds config.json, metrics.jsonl, TensorBoard events, checkpoints/ and, at the end, results.json and
report.html.
"""

from mmrf_jax.cli import common

_CONFIG = common.define_config()
_WORKDIR = common.define_path("workdir", None, "Run folder.", required=True)


def main() -> None:
    from mmrf_jax.parallel import sharding
    from mmrf_jax.training import evaluate, train

    results = train.train(common.resolve_run(_CONFIG), _WORKDIR.value)
    if sharding.is_primary():
        evaluate.print_results(results)


def run() -> None:
    """Run this command."""
    common.run(main, several=True, resumes=True)
