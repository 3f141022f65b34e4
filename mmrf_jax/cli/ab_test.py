"""Run A/B tests of rankers in the world: same users and randomness in every arm, or each user in one arm by hash.

  mmrf ab-test --config=world --arms=production,runs/world,runs/myopic \\
      --sessions=100000 --out=runs/ab.json --plot=runs/ab.png
  mmrf ab-test --config=world --arms=production,runs/world --hashed --cuped --always_valid \\
      --sessions=100000 --out=runs/ab.json
  mmrf ab-test --config=world --arms=production,runs/world --days=14 --out=runs/long.json
  mmrf ab-test --config=world --arms=production --aa=500 --sessions=20000 --out=runs/aa.json

Arms are production, random, oracle_myopic, oracle_planning, popularity (mean watch time of each video in production's
log), or run folders of `mmrf train`, which are named by their method; the first is the control. In a feedback model
(--config.simulator=feedback) the arm `logged` is the ranker that collected the model's training log.
With --days users return, and effects are also given by day. --aa runs that many A/A tests: one arm serves all users,
each test assigns them to two arms independently, and the result is how often the intervals contain zero.
"""

from absl import flags

from mmrf_jax.cli import common
from mmrf_jax.io import files

_CONFIG = common.define_config()
_ARMS = flags.DEFINE_list("arms", None, "Arms, the control first.", required=True)
_SESSIONS = flags.DEFINE_integer("sessions", 100_000, "Sessions in each arm.", lower_bound=2)
_OUT = common.define_path("out", None, "JSON file to write.", required=True)
_PLOT = common.define_path("plot", None, "PNG to draw: differences to the control with their intervals.")
_HASHED = flags.DEFINE_bool("hashed", False, "Each user in one arm, by hash, as on a platform; else in all of them.")
_CUPED = flags.DEFINE_bool("cuped", False, "Take out what the users' histories explain; of hashed and A/A tests.")
_ALWAYS_VALID = flags.DEFINE_bool("always_valid", False, "Also intervals that may be looked at again and again.")
_DAYS = flags.DEFINE_integer("days", 1, "Simulated days; above 1, users come back.", lower_bound=1)
_AA = flags.DEFINE_integer("aa", 0, "Number of A/A tests of the only arm, instead of an A/B test.", lower_bound=0)


def main() -> None:
    from mmrf_jax.parallel import multihost
    from mmrf_jax.parallel.partitioner import Partitioner
    from mmrf_jax.report import plots
    from mmrf_jax.training import arms, configs, restore, result_tables, run_folder, simulated_tests

    config = configs.override(common.resolve_run(_CONFIG), ab_test={"sessions": _SESSIONS.value})
    common.check_world(config)
    common.check_output("out", _OUT.value)
    if _PLOT.value:
        common.check_output("plot", _PLOT.value)
        if _PLOT.value.suffix != ".png":
            raise ValueError(f"--plot={_PLOT.value} is not the name of a PNG; let it end in .png")
        plots.require()
    _check_options()
    partitioner = Partitioner()
    source = restore.source_of(config, partitioner)
    names = run_folder.arm_names(_ARMS.value)
    policies = {name: arms.policy_of(arm, source, partitioner) for name, arm in zip(names, _ARMS.value, strict=True)}
    if _AA.value:
        (policy,) = policies.values()
        result = simulated_tests.run_aa_tests(source, policy, partitioner, _AA.value, _CUPED.value)
    else:
        result = simulated_tests.run_ab_test(
            source,
            policies,
            partitioner,
            days=_DAYS.value,
            hashed=_HASHED.value,
            cuped=_CUPED.value,
            always_valid=_ALWAYS_VALID.value,
        )
    if not multihost.is_primary():
        return
    files.write_json(_OUT.value, result)
    if _PLOT.value:
        draw = plots.days if _DAYS.value > 1 else plots.forest
        draw(result, _PLOT.value)
    result_tables.print_results(result)


def _check_options() -> None:
    """Refuse incompatible flags before any work is done.

    Raises:
      ValueError: naming them.
    """
    if _AA.value and (len(_ARMS.value) > 1 or _HASHED.value or _ALWAYS_VALID.value or _DAYS.value > 1 or _PLOT.value):
        raise ValueError(
            f"--aa={_AA.value} is of one arm and of one day, by hash and without a plot; give one arm in --arms and "
            "leave out --hashed, --always_valid, --days and --plot"
        )
    if _CUPED.value and not _HASHED.value and not _AA.value:
        raise ValueError("--cuped has nothing to adjust where every arm has the same users; add --hashed")


def run() -> None:
    """Run this command."""
    common.run(main, several=True)
