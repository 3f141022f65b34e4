"""Measure the program's speed and memory on this machine; write JSON and print a table.

  mmrf benchmark --suite=speed --out=runs/speed.json
  mmrf benchmark --suite=rollouts --out=runs/rollouts.json
  mmrf benchmark --suite=scale --out=runs/scale.json --plot=runs/scale.png
  mmrf benchmark --suite=serve --out=runs/serve.json
  mmrf benchmark --suite=accelerator --out=runs/accelerator.json
  mmrf benchmark --suite=checkpoints --at=gs://BUCKET/checkpoints --out=runs/checkpoints.json
  JAX_NUM_CPU_DEVICES=4 mmrf benchmark --suite=pod --out=runs/pod.json

`speed`: rates of rollouts, training, scoring and start-up, each with this machine's limit, measured in the same run.
`rollouts`: the cost of a live user request in the world under production's policy, from 2^10 to 2^20 users in one call;
it includes resets but not compilation. `scale`: how costs and memory grow with the rows of an embedding table, the
videos of the world, the users of an A/B test, the processes of a run and the rows of a log; each size runs in a
separate process. `serve`: slates per second of the ranking service, latency at 150 per second and at half of its
maximum rate, and memory over 100,000 requests; needs the extra `serve`. `accelerator`: a main job from an empty cache,
steps by batch size with the share of time that the device is busy, steps of eight seeds side by side against those of
one, and rollouts of up to a million users; meant for at most eight minutes on one card, smaller on CPUs, and written
after each part. `checkpoints`: how long saving a state
with a table of 10^7 rows (at most --max_size) stops the steps, on a disk or in object storage. `pod`: what a step takes
of each of many devices, counted in the compiled program: operations, bytes over the network, memory.
"""

import os
import platform

from absl import flags

from mmrf_jax.cli import common
from mmrf_jax.io import extras, files

_SUITES = ["speed", "rollouts", "scale", "serve", "accelerator", "checkpoints", "pod"]
_SUITE = flags.DEFINE_enum("suite", "speed", _SUITES, "What to measure.")
_OUT = common.define_path("out", None, "JSON file to write.", required=True)
_AT = common.define_path("at", None, "Folder of the suite checkpoints; what it makes there is deleted.")
_PLOT = common.define_path("plot", None, "PNG to draw: rates against limits (speed), or what grows and how (scale).")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timings of each size; the median is given.", lower_bound=1)
_MAX_USERS = flags.DEFINE_integer("max_users", 2**20, "Largest number of users in one call.", lower_bound=2**8)
_MAX_SIZE = flags.DEFINE_integer(
    "max_size", 10**8, "Largest size of the suites scale and checkpoints.", lower_bound=10**3
)
_REQUESTS = flags.DEFINE_integer(
    "requests", 100_000, "Slates of the suite serve, after those that warm it.", lower_bound=5_000
)
_SEGMENTS = flags.DEFINE_integer("segments", 32, "Of a batch, per device, in the suite pod.", lower_bound=1)
_VIDEOS = flags.DEFINE_integer("videos", 100_000, "Of the world, in the suite pod.", lower_bound=100)
_PARTS = flags.DEFINE_list(
    "parts", None, "Parts of the suites speed, scale and accelerator, which `--parts=?` lists. Default: all."
)


def main() -> None:
    import jax

    with extras.needed("data"):
        from mmrf_jax.cli.benchmarks import accelerator, checkpoints, cost, pod, rollouts, scale, speed
    from mmrf_jax.report import plots

    common.check_output("out", _OUT.value)
    if _PLOT.value and _SUITE.value not in ("speed", "scale"):
        raise ValueError(f"--plot draws the suites speed and scale; leave it out for --suite={_SUITE.value}")
    if _PLOT.value:
        common.check_output("plot", _PLOT.value)
        plots.require()
    suites = {"speed": list(speed.PARTS), "scale": list(scale.PARTS), "accelerator": list(accelerator.PARTS)}
    there = suites.get(_SUITE.value, [])
    parts = there if _PARTS.value is None else _PARTS.value
    if unknown := sorted(set(parts) - set(there)):
        if not there:
            raise ValueError(f"--suite={_SUITE.value} has no parts; leave out --parts")
        raise ValueError(f"unknown --parts={unknown[0]}; choose among {', '.join(there)}")
    backend, devices = cost.alone(cost.devices)  # this process must not take them from those that measure
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "devices": devices,
        "jax": jax.__version__,
    }

    def save(results):
        files.write_json(_OUT.value, {"results": results, "machine": machine})

    if _SUITE.value == "rollouts":
        results = rollouts.rollouts(_REPEATS.value, _MAX_USERS.value)
        results.append({"name": "peak_memory", "value": cost.peak_memory(), "unit": "GiB"})
    elif _SUITE.value == "scale":
        results = scale.scale(parts, _MAX_SIZE.value, _REPEATS.value)
    elif _SUITE.value == "checkpoints":
        if _AT.value is None:
            raise ValueError("--suite=checkpoints needs --at=FOLDER, on a disk or in object storage")
        results = checkpoints.checkpoints(_AT.value, min(_MAX_SIZE.value, 10**7), _REPEATS.value)
    elif _SUITE.value == "pod":
        results = pod.pod(_SEGMENTS.value, _VIDEOS.value)
    elif _SUITE.value == "serve":
        with extras.needed("serve"):
            from mmrf_jax.cli.benchmarks import serve

        results = serve.serve(_REPEATS.value, _REQUESTS.value)
    elif _SUITE.value == "accelerator":
        results = accelerator.accelerator(parts, backend == "cpu", save)
    else:
        results = speed.speed(parts, _REPEATS.value, _MAX_USERS.value)
    save(results)
    if _PLOT.value:
        draw = plots.limits if _SUITE.value == "speed" else plots.growth
        draw(results, _PLOT.value)
    for entry in results:
        limit = f"  {entry['fraction_of_limit']:6.1%} of {entry['limit']:,.0f}" if "limit" in entry else ""
        print(f"{entry['name']:<40} {entry['value']:14,.3f} {entry['unit']}{limit}")


def run() -> None:
    """Run this command."""
    common.run(main)
