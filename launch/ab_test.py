"""A paired A/B test of rankers in the world: the same users, with the same chance, in every arm.

  python -m launch.ab_test --config=experiments/world.py --arms=production,runs/world,runs/myopic \\
      --sessions=100000 --out=runs/ab.json --plot=runs/ab.png

Arms are production, random, oracle_myopic, oracle_planning, or run folders of launch.train; the first is the control.
"""

from pathlib import Path

from absl import flags

from launch import common
from mmrf_jax.evaluation import plots
from mmrf_jax.metrics import files
from mmrf_jax.parallel import mesh as par
from mmrf_jax.training import judging, loop

_CONFIG = common.define_config()
_ARMS = flags.DEFINE_list("arms", None, "Arms, the control first.", required=True)
_SESSIONS = flags.DEFINE_integer("sessions", 100_000, "Sessions in each arm.", lower_bound=2)
_OUT = flags.DEFINE_string("out", None, "JSON file to write.", required=True)
_PLOT = flags.DEFINE_string("plot", None, "PNG to draw: differences to the control with their intervals.")


def main() -> None:
    config = common.resolve(_CONFIG)
    common.check_world(config)
    common.check_output("out", _OUT.value)
    if _PLOT.value:
        common.check_output("plot", _PLOT.value)
        if not _PLOT.value.endswith(".png"):
            raise ValueError(f"--plot={_PLOT.value} is not the name of a PNG; let it end in .png")
    mesh = par.make_mesh()
    source = loop.source_of(config, mesh)
    policies = {
        Path(name).name if Path(name).is_dir() else name: loop.policy_of(name, source, mesh) for name in _ARMS.value
    }
    if len(policies) < len(_ARMS.value):
        raise ValueError(f"--arms={','.join(_ARMS.value)} repeats a name; arms are named by their last folder")
    config.ab_test.sessions = _SESSIONS.value
    result = judging.compare(config, source, policies, mesh)
    files.write_json(_OUT.value, result)
    if _PLOT.value:
        plots.forest(result, _PLOT.value)
    judging.print_results(result)


if __name__ == "__main__":
    common.run(main)
