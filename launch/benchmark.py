"""What the program costs on this machine, as JSON and a table.

  python -m launch.benchmark --suite=rollouts --out=runs/benchmark.json
  python -m launch.benchmark --suite=scale --out=runs/scale.json --plot=runs/scale.png

`rollouts`: the cost of a live user request in the world under production's policy, from 2^10 to 2^20 users in one call;
resets are in it, compilation is not. `scale`: how costs and memory grow with the rows of an embedding table, the videos
of the world and the users of an A/B test; each size in a process of its own.
"""

import os
import platform
import resource

import jax
from absl import flags

from launch import common
from launch.benchmarks import rollouts, scale
from mmrf_jax.evaluation import plots
from mmrf_jax.metrics import files

_SUITE = flags.DEFINE_enum("suite", "rollouts", ["rollouts", "scale"], "What to measure.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.", required=True)
_PLOT = flags.DEFINE_string("plot", None, "PNG to draw: what grows, and how; of the suite scale.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timings of each size; the median is given.", lower_bound=1)
_MAX_USERS = flags.DEFINE_integer("max_users", 2**20, "Largest number of users in one call.", lower_bound=2**10)
_MAX_SIZE = flags.DEFINE_integer("max_size", 10**8, "Largest size of the suite scale.", lower_bound=10**3)
_PARTS = flags.DEFINE_list("parts", list(scale.PARTS), f"Parts of the suite scale, among {', '.join(scale.PARTS)}.")


def main() -> None:
    common.check_output("out", _OUT.value)
    if _PLOT.value:
        common.check_output("plot", _PLOT.value)
    if unknown := sorted(set(_PARTS.value) - set(scale.PARTS)):
        raise ValueError(f"unknown --parts={unknown[0]}; choose among {', '.join(scale.PARTS)}")
    if _SUITE.value == "rollouts":
        results = rollouts.rollouts(_REPEATS.value, _MAX_USERS.value)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        results.append({"name": "peak_memory", "value": peak, "unit": "GiB"})
    else:
        results = scale.scale(_PARTS.value, _MAX_SIZE.value, _REPEATS.value)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "devices": [str(d) for d in jax.devices()],
        "jax": jax.__version__,
    }
    files.write_json(_OUT.value, {"results": results, "machine": machine})
    if _PLOT.value:
        plots.growth(results, _PLOT.value)
    for entry in results:
        print(f"{entry['name']:<40} {entry['value']:10.3f} {entry['unit']}")


if __name__ == "__main__":
    common.run(main)
