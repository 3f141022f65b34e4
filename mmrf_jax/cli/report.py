"""Write WORKDIR/report.html, a page of a run that opens offline: results, curves, agents, example sessions.

  mmrf report --workdir=runs/world [--config.data.dir=DIR]

`mmrf train` writes it at the end of a run; for an unfinished run it shows the data so far.
"""

import sys

from mmrf_jax.cli import common

_WORKDIR = common.define_path("workdir", None, "Run folder of `mmrf train`.", required=True)
_CONFIG = common.define_run_config(sys.argv)


def main() -> None:
    from mmrf_jax.training import restore, run_report

    run = restore.load_run(common.resolve_run(_CONFIG), _WORKDIR.value)
    print(run_report.write_report(run, _WORKDIR.value))


def run() -> None:
    """Run this command."""
    common.run(main)
