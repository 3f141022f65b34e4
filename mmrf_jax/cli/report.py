"""Write WORKDIR/report.html, a page of a run that opens offline: results, curves, agents, example sessions.

  mmrf report --workdir=runs/world [--config.data.dir=DIR]

`mmrf train` writes it at the end of a run; for an unfinished run it shows the data so far.
"""

import sys

from mmrf_jax.cli import common

_WORKDIR = common.define_path("workdir", None, "Run folder of `mmrf train`.", required=True)
_CONFIG = common.define_run_config(sys.argv)


def main() -> None:
    from mmrf_jax.parallel.partitioner import Partitioner
    from mmrf_jax.training import restore, run_report

    config, workdir = common.resolve_run(_CONFIG), _WORKDIR.value
    partitioner = Partitioner()
    source = restore.source_of(config, partitioner, workdir=workdir)
    state = restore.load_state(config, source, workdir, partitioner)
    print(run_report.write_report(config, source, state, workdir))


def run() -> None:
    """Run this command."""
    common.run(main)
