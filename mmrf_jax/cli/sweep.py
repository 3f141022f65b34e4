"""Run a study: every variant with every seed, then one table. Re-running the same command resumes it.

  mmrf sweep --config=experiments/table_ablation.py --out=experiments/results/table_ablation
  mmrf sweep --config=experiments/table_ablation.py --config.quick=True --out=/tmp/a --runs=/tmp/b
  mmrf sweep --config=experiments/table_estimators.py --out=experiments/results/table_estimators

OUT gets table.json and table.md. Each run has its folder below --runs, named by its config, so that studies share runs;
any of them can be an arm of `mmrf ab-test`, and `mmrf report` writes its page. --config.tables selects the tables:
ab_test, ab_test_users, ab_test_exit_hazard (the shifted worlds), by_day, offline, offline_frozen, offline_random,
errors, model_exploitation_gap, conflict. A study of policies instead of variants trains nothing: it evaluates the
off-policy estimators against the world.

--config.run.seeds=5 trains five seeds of a variant side by side (docs/accelerators.md), into the same folders.

A config with a `space` is a search, by Optuna (pip install 'mmrf_jax[optuna]'): random, TPE, ASHA. Its runs are in
OUT/runs.

  mmrf sweep --config=experiments/search.py --out=runs/search

Started several times, on one machine or on many with shared folders, the processes share the runs of a study and the
trials of a search (launch/slurm/sweep.sbatch, launch/gke/sweep.yaml).
"""

from mmrf_jax.cli import common
from mmrf_jax.io import files

_CONFIG = common.define_config()
_OUT = common.define_path("out", None, "Folder of the tables.", required=True)
_RUNS = common.define_path("runs", "runs/study", "Folder of the runs, shared by studies.")


def main() -> None:
    from mmrf_jax.sweeps import measurements, off_policy_study, search, study, sweep

    config, out = common.resolve(_CONFIG), _OUT.value
    common.check_output("out", out / "table.json")
    if "space" in config:
        print(search.format_trials(search.run_search(config, out), config))
        return
    if "policies" not in config:
        sweep.check_study(study.Study(config, out, _RUNS.value))  # before creating the folder
    out.mkdir(parents=True, exist_ok=True)
    if "policies" in config:
        with files.held(out):
            print(off_policy_study.format_errors(off_policy_study.run_error_study(config, out)))
    elif (table := sweep.run_study(config, out, _RUNS.value)) is not None:
        print(measurements.format_study(table))


def run() -> None:
    """Run this command."""
    common.run(main, resumes=True)
