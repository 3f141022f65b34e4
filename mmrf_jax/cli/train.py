"""Train a ranker and write its run folder. Re-running with the same --workdir resumes from the latest checkpoint.

  mmrf train --config=world --workdir=runs/world
  mmrf train --config=kuairand --config.data.dir=$KUAIRAND_DIR --workdir=runs/kuairand
  mmrf train --config=kuairand --config.data.dir=NEW_DAYS --workdir=runs/next --init_from=runs/kuairand
  mmrf train --import=my_module --config=world --config.method=my_method --workdir=runs/mine

The run folder holds config.json, metrics.jsonl, metrics.csv, TensorBoard events, checkpoints/ and, at the end,
results.json and report.html. The last line printed is the verdict: better, worse or not distinguishable from
production. A finished run continues if config.alternation.rounds is raised.

  mmrf train --config=world --config.seeds=8 --workdir=runs/world

trains eight seeds side by side (docs/accelerators.md), into the run folders runs/world/seed0 to runs/world/seed7.
"""

import dataclasses

from mmrf_jax.cli import common

_CONFIG = common.define_config()
_WORKDIR = common.define_path("workdir", None, "Run folder.", required=True)
_INIT_FROM = common.define_path("init_from", None, "Run folder to begin with what it has learned; it stays unchanged.")


def main() -> None:
    from mmrf_jax.parallel import multihost
    from mmrf_jax.report import verdict
    from mmrf_jax.training import configs, result_tables, side_by_side, train

    config = common.resolve_run(_CONFIG)
    if _INIT_FROM.value:
        config = dataclasses.replace(config, init_from=str(_INIT_FROM.value))
    runs = side_by_side.runs_of(config, _WORKDIR.value)
    for (workdir, one), results in zip(runs.items(), train.train_runs(runs).values(), strict=True):
        if multihost.is_primary():
            if len(runs) > 1:
                print(f"\n{workdir}")
            result_tables.print_results(results)
            print(f"\n{verdict.of_run(results, configs.as_dict(one)).sentence}")


def run() -> None:
    """Run this command."""
    common.run(main, several=True, resumes=True)
