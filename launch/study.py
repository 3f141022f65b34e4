"""Runs a study: every variant with every seed, then one table; run again, it goes on where it was.

  python -m launch.study --config=experiments/table_ablation.py --out=experiments/results/table_ablation
  python -m launch.study --config=experiments/table_ablation.py --config.quick=True --out=/tmp/a --runs=/tmp/b

OUT gets table.json and table.md. Each run has a folder of its own below --runs, named by its config, so studies share
runs; any of them can be an arm of launch.ab_test.
"""

from pathlib import Path

from absl import flags

from launch import common
from mmrf_jax.training import study

_CONFIG = common.define_config()
_OUT = flags.DEFINE_string("out", None, "Folder of the tables.", required=True)
_RUNS = flags.DEFINE_string("runs", "runs/study", "Folder of the runs, shared by studies.")


def main() -> None:
    common.check_output("out", str(Path(_OUT.value) / "table.json"))
    print(study.format_table(study.run(common.resolve(_CONFIG), Path(_OUT.value), Path(_RUNS.value))))


if __name__ == "__main__":
    common.run(main)
