"""Compute offline metrics and model quality of a trained run on the test days, in the world also against the truth.

The results are printed and written to WORKDIR/evaluation.json.

  mmrf evaluate --workdir=runs/kuairand [--config.data.dir=DIR]
"""

import sys

from mmrf_jax.cli import common
from mmrf_jax.io import files
from mmrf_jax.io.progress import phase

_WORKDIR = common.define_path("workdir", None, "Run folder of `mmrf train`.", required=True)
_CONFIG = common.define_run_config(sys.argv)


def main() -> None:
    from mmrf_jax.training import evaluate, restore, result_tables, world_truth

    run = restore.load_run(common.resolve_run(_CONFIG), _WORKDIR.value)
    result = evaluate.evaluate_run(run, thorough=True)
    if run.source.truth is not None:
        phase("truth")
        result |= world_truth.compare_with_truth(run)
    files.write_json(_WORKDIR.value / "evaluation.json", result)
    result_tables.print_results(result)


def run() -> None:
    """Run this command."""
    common.run(main)
