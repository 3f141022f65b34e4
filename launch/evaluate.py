"""Offline metrics of a trained run on the test days, printed and written to WORKDIR/evaluation.json.

python -m launch.evaluate --workdir=runs/kuairand [--config.data.dir=DIR]
"""

import dataclasses
import sys
from pathlib import Path

from absl import flags

from launch import common
from mmrf_jax.metrics import files
from mmrf_jax.parallel import mesh as par
from mmrf_jax.training import loop, sources

_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of launch.train.", required=True)
_CONFIG = common.define_run_config(sys.argv)


def main() -> None:
    config, workdir = common.resolve(_CONFIG), Path(_WORKDIR.value)
    mesh = par.make_mesh()
    source = sources.from_config(config, loop.progress)
    source = dataclasses.replace(source, items=par.put_replicated(source.items, mesh))
    state = loop.load_state(config, source, workdir, mesh)
    result = loop.evaluate(config, source, state)
    files.write_json(workdir / "evaluation.json", result)
    loop.print_results(result)


if __name__ == "__main__":
    common.run(main)
