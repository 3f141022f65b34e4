"""Compare up to 20 runs, or the runs of a sweep, on one page that opens offline: metrics, curves, configs.

  mmrf compare runs/world runs/myopic --out=runs/compare.html
  mmrf compare experiments/results/table_ablation --runs=runs/study --out=runs/ablation.html

The first run is the one that the others are compared with. A folder of run folders stands for all of them; of a sweep
with more than 20 runs the first seed is shown.
"""

from mmrf_jax.cli import common
from mmrf_jax.io import extras, files

_OUT = common.define_path("out", "compare.html", "Page to write.")
_RUNS = common.define_path("runs", "runs/study", "Folder of a sweep's runs.")


def main(folders: list[str]) -> None:
    with extras.needed("report"):
        from mmrf_jax.report import compare
        from mmrf_jax.training import comparison

    common.check_output("out", _OUT.value)
    runs, notes = comparison.load_runs([files.user_path(folder, "RUN") for folder in folders], _RUNS.value)
    files.write_text(_OUT.value, compare.build(runs, notes))
    print(_OUT.value)


def run() -> None:
    """Run this command."""
    common.run(main, positional=True, devices=False)
