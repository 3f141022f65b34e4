"""The training loop: `train_runs` reads from set-up to report, and its chapters follow in the same order.

The chapter of the rounds is `rounds`; only these two modules drive the devices. docs/training-loop.md describes them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from mmrf_jax import plugins
from mmrf_jax.agents import registry
from mmrf_jax.checkpointing import manager
from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.envs import rankers
from mmrf_jax.io import files, profile, trackers
from mmrf_jax.io.progress import interruptible, observed, phase, say
from mmrf_jax.parallel import multihost, preemption, programs
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import (
    arms,
    configs,
    evaluate,
    hooks,
    inputs,
    own_logs,
    provenance,
    restore,
    rounds,
    run_folder,
    run_report,
    side_by_side,
    simulated_tests,
    simulator_source,
    sources,
    steps,
    warm_start,
)
from mmrf_jax.training.train_state import TrainState
from mmrf_jax.training.trained_run import TrainedRun

_KEEP = 3  # checkpoints


def train_run(config: configs.Run, workdir: Path, brief: bool = False, log: SessionLog | None = None) -> dict[str, Any]:
    """Run a config of one seed to its results; see `train_runs`.

    Raises:
      ValueError: for several seeds, or an invalid config.
    """
    if config.seeds > 1:
        raise ValueError(f"config.seeds={config.seeds} makes several runs, and this trains one; use mmrf train")
    return train_runs({workdir: config}, brief, log)[workdir]


def train_runs(
    runs: Mapping[Path, configs.Run], brief: bool = False, log: SessionLog | None = None
) -> dict[Path, dict[str, Any]]:
    """Run configs to their results, resuming from the latest checkpoints in their folders; return the results.

    Args:
      runs: {run folder: config} of runs that differ in their seeds alone (`side_by_side.runs_of`). Several are trained
        side by side, each as if it were alone.
      brief: whether to skip the report (`mmrf report` can write it later) and, on real logs, the simple rankers that
        the run is compared with, as in a study.
      log: the log of a run on `logs`; None to read the one that the config names.
    """
    # ------------------------------------------------------------------------------------------------------- Set-up
    runs, log, partitioner = _checked(runs, log)
    with contextlib.ExitStack() as stack:
        results: dict[Path, dict[str, Any]] = {}
        for workdir, config in runs.items():
            finished = multihost.on_primary(functools.partial(_begun, stack, workdir, config, brief, log))
            if finished is not None:
                say(f"{workdir} is finished; nothing to do")
                results[workdir] = finished
        if len(results) == len(runs):
            return results
        compiled = stack.enter_context(contextlib.closing(programs.Ahead()))
        watch = stack.enter_context(preemption.watching())
        stack.enter_context(interruptible(watch.check))
        spent = stack.enter_context(hooks.PhaseTimes(compiled))
        stack.enter_context(observed(spent.begin))

        # ----------------------------------------------------------------------------------------------------- Data
        phase("prepare")
        jobs = _prepared(runs, results, partitioner, compiled)

        # ------------------------------------------------------------------------------- State, restore and rounds
        with contextlib.ExitStack() as opened:
            learners = [_restored(job, opened.enter_context(_checkpoints(job))) for job in jobs]
            rounds.train_rounds([learner for learner in learners if learner.learned is None], len(runs))

        # ---------------------------------------------------------------------------------------- Evaluation, report
        for learner in learners:
            results[learner.job.workdir] = _concluded(learner, brief, spent)
        return {workdir: results[workdir] for workdir in runs}


# --------------------------------------------------------------------------------------------------------------- Set-up


def _checked(
    runs: Mapping[Path, configs.Run], log: SessionLog | None
) -> tuple[dict[Path, configs.Run], SessionLog | None, Partitioner]:
    """Return the configs to store, the log of runs on `logs`, and the partitioner; writes nothing.

    Raises:
      ValueError: for an invalid config.
    """
    partitioner = Partitioner()
    checked: dict[Path, configs.Run] = {}
    for workdir, config in runs.items():
        configs.validate_config(configs.as_dict(config))
        config, log = own_logs.prepare_own_log(config, workdir, log)
        registry.configured(config.method, config.agents, config.plugins)
        profile.parse_steps(config.profile_steps)
        trackers.check_trackers(config.trackers)
        partitioner.check_divisible(config.train.batch, "train.batch")
        partitioner.check_divisible(config.feedback.batch, "feedback.batch")
        if config.source == "world" and config.simulator == "world":
            _check_arms(config, simulator_source.WORLD_ARMS)
        side_by_side.check_side_by_side(config, len(runs), partitioner)
        config = _with_plugins(config)
        if checked:
            config = dataclasses.replace(config, profile_steps="")  # a trace shows all runs, and one is taken at a time
        multihost.on_primary(functools.partial(warm_start.check_init_from, config, workdir))
        checked[workdir] = config
    return checked, log, partitioner


def _check_arms(config: configs.Run, policies: Collection[str]) -> list[str]:
    """Return the config's arms, except the run's own ranker, which is added later; refuse unknown ones."""
    names = [name for name in config.ab_test.arms if name != config.method]
    registered = [name for name in names if name not in policies and plugins.POLICIES.find(name, config.plugins)]
    arms.check_arms(names, [*policies, *registered], "config.ab_test.arms")
    return names


def _arms(config: configs.Run, source: sources.Source) -> dict[str, rankers.AnyRanker]:
    return {name: arms.untrained_arm(name, source) for name in _check_arms(config, source.policies)}


def _with_plugins(config: configs.Run) -> configs.Run:
    """Return the config with the modules that register its method and arms, so that commands find them again."""
    found = {registry.module_of(config.method), *map(plugins.POLICIES.module_of, config.ab_test.arms)}
    return dataclasses.replace(config, plugins=tuple(sorted({*config.plugins, *filter(None, found)})))


def _begun(
    stack: contextlib.ExitStack, workdir: Path, config, brief: bool, log: SessionLog | None
) -> dict[str, Any] | None:
    """Return the results of a finished run; otherwise lock its folder until the stack closes and return None.

    Stores the log of a run on `logs`, so that the folder is complete without its source.
    """
    results = _read_if_exists(workdir / "results.json")
    if run_folder.needs_more_rounds(workdir, configs.as_dict(config)):
        results = None
    written = brief or (workdir / "report.html").exists() or not run_folder.has_checkpoint(workdir)
    if results is not None and (written or run_report.missing_for_report()):
        run_folder.check_same_config(workdir, configs.as_dict(config))
        return results
    stack.enter_context(run_folder.claimed_workdir(workdir, configs.as_dict(config)))
    provenance.record_start(workdir)
    if log is not None and not (workdir / run_folder.LOG).exists():
        log.save(workdir / run_folder.LOG)
    return None


def _read_if_exists(path: Path) -> dict[str, Any] | None:
    """Read a JSON file that an earlier process of this run wrote; None if it does not exist."""
    return run_folder.read_json(path) if path.exists() else None


# ----------------------------------------------------------------------------------------------------------------- Data


def _prepared(
    runs: Mapping[Path, configs.Run], finished: Collection[Path], partitioner: Partitioner, compiled: programs.Ahead
) -> list[rounds.TrainingJob]:
    """Open the source of each run that is not finished, and write what serving it needs; their world is shared."""
    jobs: list[rounds.TrainingJob] = []
    for number, (workdir, config) in enumerate(runs.items()):
        if workdir in finished:
            continue
        like = jobs[0].source if jobs else None
        closed_loop = config.alternation.closed_loop
        with preemption.at_once():
            source = restore.source_of(config, partitioner, closed_loop=closed_loop, workdir=workdir, like=like)
        plan = steps.plan_of(config, source.spec.signals)
        others = {} if source.sim is None else _arms(config, source)
        name = f"seed {config.seed}" if len(runs) > 1 else ""
        if source.report and not jobs:
            say(f"input: {json.dumps(source.report, default=str)}")
        if multihost.is_primary():
            inputs.write_inputs(workdir, inputs.inputs_of_source(source.local()))
        jobs.append(rounds.TrainingJob(config, plan, workdir, number, name, partitioner, source, others, compiled))
    return jobs


# ---------------------------------------------------------------------------------------------------- State and restore


def _checkpoints(job: rounds.TrainingJob) -> manager.Checkpoints:
    return manager.Checkpoints(
        job.workdir / "checkpoints",
        keep=_KEEP,
        save_interval=job.config.checkpoint_every,
        agree=multihost.on_primary,
    )


def _restored(job: rounds.TrainingJob, checkpoints: manager.Checkpoints) -> rounds.Learner:
    """Return the state to begin with, its step, and what learned.json says if training is complete.

    A run goes on from the first of these that it has:

    1. results.json and report.html: nothing is left to do (`_begun`); without the report, only that is written.
    2. learned.json: the newest checkpoint is the end of training, only the evaluation is left.
    3. A checkpoint: the newest intact one. Its `round` and `done` say where: `rounds` skips the fits and updates done,
       `MetricsWriter` cuts metrics.jsonl back to its step, and the log of its round is collected again.
    4. Nothing: no state, step 0. The state is initialised when the first log is there.
    """
    if checkpoints.latest_step() is None:
        return rounds.Learner(job, checkpoints)
    job.announce()
    state, step = checkpoints.restore(restore.state_shapes(job.config, job.source, job.partitioner))
    say(f"resumed at step {step}, round {min(int(state.round) + 1, job.plan.rounds)}")
    learned = multihost.on_primary(lambda: _read_if_exists(job.workdir / "learned.json"))
    return rounds.Learner(job, checkpoints, state, step, learned if learned and learned["steps"] == step else None)


# ----------------------------------------------------------------------------------------------------------- Evaluation


def _concluded(learner: rounds.Learner, brief: bool, spent: hooks.PhaseTimes) -> dict[str, Any]:
    """Evaluate a run that is trained, write its results and its report, and return the results."""
    job, state, learned = learner.job, learner.state, learner.learned
    job.announce()
    result = multihost.on_primary(lambda: _read_if_exists(job.workdir / "results.json"))  # if stopped at the report
    with preemption.at_once():
        if result is None:
            result = {"train": learned} | _evaluate(job, state, brief)
            phase("results")
            if multihost.is_primary():
                _write_results(job, result, spent.seconds)
        if not brief:
            run = job.trained(state).local()
            run.source.test()  # a collective operation if the test log has not been collected yet
            preemption.part()
            if multihost.is_primary():
                _report(run, job.workdir)
    return result


def _evaluate(job: rounds.TrainingJob, state: TrainState, brief: bool) -> dict[str, Any]:
    """Compare the trained ranker with the other arms, then evaluate it on the held-out logs."""
    result: dict[str, Any] = {}
    run = job.trained(state)
    if run.source.sim is not None:
        run.begin("ab_test", "A/B test")
        result |= _ab_test(run, job.workdir)
    run.begin("offline")
    return result | evaluate.evaluate_run(run.local(), with_baselines=not brief)


def _ab_test(run: TrainedRun, workdir: Path) -> dict[str, Any]:
    """Compare a run with the other arms; the per-user sums of its arm go to the run folder."""
    own = registry.get(run.plan.method).make_policy(run.state.agents, run.source.items, run.plan.agents)
    policies, blocks = {**run.arms, run.plan.method: own}, []
    result = simulated_tests.run_ab_test(
        run.source, policies, run.partitioner, observe=lambda sums: blocks.append(sums[run.plan.method])
    )
    if multihost.is_primary():
        run_folder.write_user_sums(workdir, blocks)
    return result


# --------------------------------------------------------------------------------------------------------------- Report


def _write_results(job: rounds.TrainingJob, result: dict[str, Any], seconds: Callable[[], dict[str, float]]) -> None:
    """Write results.json, then this process's times, as a line and as a row of metrics.jsonl; both go to trackers."""
    files.write_json(job.workdir / "results.json", result)
    spent, step = seconds(), result["train"]["steps"]
    say(hooks.describe_times(spent))
    with rounds.open_writer(job.config, job.workdir, step) as writer:
        writer.write(step, "time", {f"seconds_{kind}": round(value, 3) for kind, value in spent.items()})
        writer.summarise(run_report.headline(job.config, result))


def _report(run: TrainedRun, workdir: Path) -> None:
    """Write the run's report. The results are already saved, so any error here is only logged."""
    if (missing := run_report.missing_for_report()) is not None:
        say(f"no report: {missing}, then mmrf report --workdir={workdir}")
        return
    try:
        phase("report")
        page = run_report.write_report(run, workdir, thorough=False)
        say(f"report: {page}, a page for any browser")
    except Exception as error:
        fix = f"mmrf report --workdir={workdir} tries again"
        say(f"no report: {type(error).__name__}: {error}; {fix}")
