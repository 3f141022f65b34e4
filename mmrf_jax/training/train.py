"""The training loop: `train` reads from the set-up of a run to its report, its chapters follow in the same order.

Only this module drives the devices. docs/training-loop.md describes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from mmrf_jax import plugins
from mmrf_jax.agents import registry
from mmrf_jax.checkpointing import manager
from mmrf_jax.data import device_log, sessions
from mmrf_jax.data.frame_log import SessionLog
from mmrf_jax.envs import rankers
from mmrf_jax.io import files, metric_writer, profile, trackers
from mmrf_jax.io.progress import check, interruptible, observed, phase, say
from mmrf_jax.models.feedback_model import fitting
from mmrf_jax.parallel import multihost, preemption, programs
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import (
    arms,
    batches,
    compilation,
    configs,
    evaluate,
    hooks,
    inputs,
    memory,
    own_logs,
    provenance,
    restore,
    run_folder,
    run_report,
    sources,
    steps,
    train_state,
    warm_start,
)
from mmrf_jax.training.on_device import DeviceBatches
from mmrf_jax.training.train_state import TrainState

_KEEP = 3  # checkpoints
_MEASURED = 16  # batches of held-out sessions on which the feedback model is measured


def train(config: configs.Run, workdir: Path, brief: bool = False, log: SessionLog | None = None) -> dict[str, Any]:
    """Run a config to its results, resuming from the latest checkpoint in the folder; return the results.

    Args:
      brief: whether to skip the report (`mmrf report` can write it later) and, on real logs, the simple rankers that
        the run is compared with, as in a study.
      log: the log of a run on `logs`; None to read the one that the config names.
    """
    # ------------------------------------------------------------------------------------------------------- Set-up
    config, log, partitioner = _checked(config, workdir, log)
    with contextlib.ExitStack() as stack:
        finished = multihost.on_primary(lambda: _begun(stack, workdir, config, brief, log))
        if finished is not None:
            say(f"{workdir} is finished; nothing to do")
            return finished
        compiled = stack.enter_context(contextlib.closing(programs.Ahead()))
        watch = stack.enter_context(preemption.watching())
        stack.enter_context(interruptible(watch.check))
        spent = stack.enter_context(hooks.Times(compiled))
        stack.enter_context(observed(spent.begin))

        # ----------------------------------------------------------------------------------------------------- Data
        phase("prepare")
        with preemption.at_once():
            source = restore.source_of(config, partitioner, collects=config.alternation.closed_loop, workdir=workdir)
        plan = steps.plan_of(config, source.spec.signals)
        others = {} if source.sim is None else _arms(config, source)
        job = _Job(config, plan, workdir, partitioner, source, others, compiled)
        if source.report:
            say(f"input: {json.dumps(source.report, default=str)}")
        if multihost.is_primary():
            inputs.write(workdir, inputs.of_source(source.local()))

        # ------------------------------------------------------------------------------- State, restore and rounds
        with manager.Checkpoints(
            workdir / "checkpoints", keep=_KEEP, save_interval=config.checkpoint_every, agree=multihost.on_primary
        ) as checkpoints:
            state, step, learned = _restored(job, checkpoints)
            if learned is None:
                state, learned = _learn(job, state, step, checkpoints)
        assert state is not None  # restored or trained

        # ----------------------------------------------------------------------------------------------- Evaluation
        result = multihost.on_primary(lambda: _read_if_exists(workdir / "results.json"))  # if stopped at the report
        with preemption.at_once():
            if result is None:
                result = {"train": learned} | _evaluate(job, state, brief)
                phase("results")
                if multihost.is_primary():
                    _write_results(job, result, spent.seconds)

            # ------------------------------------------------------------------------------------------------ Report
            if not brief:
                source, state = source.local(), multihost.to_local(state)
                source.test()  # a collective operation if the test log has not been collected yet
                preemption.part()
                if multihost.is_primary():
                    _report(config, source, state, workdir)
        return result


@dataclasses.dataclass(frozen=True)
class _Job:
    """What stays the same while a run is trained.

    Attributes:
      source: its items are replicated on the partitioner's devices.
      arms: the policies of the A/B test in addition to the run's own.
      compiled: compiles the run's programs ahead of their first calls.
    """

    config: configs.Run
    plan: steps.TrainConfig
    workdir: Path
    partitioner: Partitioner
    source: sources.Source
    arms: dict[str, rankers.AnyRanker]
    compiled: programs.Ahead

    def begin(self, name: str, program: str | None = None) -> None:
        """Announce a phase, and wait until its program is compiled (by default the one of the same name)."""
        phase(name)
        self.compiled.wait(program or name, check, say)

    def trained(self, state: TrainState) -> evaluate.TrainedRun:
        """Return the run as evaluators see it."""
        return evaluate.TrainedRun(self.config, self.plan, self.source, state, self.partitioner, self.arms, self.begin)


# --------------------------------------------------------------------------------------------------------------- Set-up


def _checked(
    config: configs.Run, workdir: Path, log: SessionLog | None
) -> tuple[configs.Run, SessionLog | None, Partitioner]:
    """Return the config as it is to be stored, the log of a run on `logs`, and the partitioner; writes nothing.

    Raises:
      ValueError: for an invalid config.
    """
    configs.validate(configs.as_dict(config))
    config, log = own_logs.prepare(config, workdir, log)
    registry.configured(config.method, config.agents, config.plugins)
    profile.parse(config.profile_steps)
    trackers.check(config.trackers)
    partitioner = Partitioner()
    partitioner.check_divisible(config.train.batch, "train.batch")
    partitioner.check_divisible(config.feedback.batch, "feedback.batch")
    if config.source == "world" and config.simulator == "world":
        _check_arms(config, sources.WORLD_ARMS)
    config = _with_plugins(config)
    multihost.on_primary(lambda: warm_start.check(config, workdir))
    return config, log, partitioner


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
    if results is not None and (written or run_report.missing()):
        run_folder.check(workdir, configs.as_dict(config))
        return results
    stack.enter_context(run_folder.claimed(workdir, configs.as_dict(config)))
    provenance.record(workdir)
    if log is not None and not (workdir / run_folder.LOG).exists():
        log.save(workdir / run_folder.LOG)
    return None


def _read_if_exists(path: Path) -> dict[str, Any] | None:
    """Read a JSON file that an earlier process of this run wrote; None if it does not exist."""
    return run_folder.read_json(path) if path.exists() else None


# ----------------------------------------------------------------------------------------------------------------- Data


def _log_of_round(job: _Job, state: TrainState | None, number: int, before: batches.Batches | None) -> batches.Batches:
    """Return the log of a round: that of the round before, the first policy's, or one that the agents collect.

    Args:
      state: at the beginning of the round; None in a new run.
      before: log of the round before; None in the first round of this process.
    """
    if number == 0 or not job.plan.closed_loop:
        if before is not None:
            return before
        if job.source.sim is not None:
            given = isinstance(job.config.data, configs.OwnLogs) or job.config.data.dir
            phase("read" if given else "collect")
        with preemption.at_once():
            return _first_log(job)
    phase("collect")
    assert state is not None
    with preemption.at_once():
        return _collected(job, _server(job, state), number)


def _first_log(job: _Job) -> batches.Batches:
    """Return the log of a run's first round, or of all its rounds: collected or read, in memory or streamed.

    Raises:
      ValueError: for a log that is to stay on the devices, but is streamed.
    """
    config, discount, on_device = job.config, job.plan.agents.discount, job.config.train.log_on_device
    if (blocks := job.source.blocks()) is not None:
        if on_device:
            fix = "use --config.train.log_on_device=False, or --config.data.stream=False where memory allows"
            raise ValueError(f"config.train.log_on_device=True, but the log is streamed; {fix}")
        return batches.StreamedBatches(config, blocks, job.partitioner, discount, len(job.plan.agents.all_signals))
    if not on_device:
        return batches.InMemoryBatches(config, job.source.train(), job.partitioner)
    if job.source.train_on_devices is not None:
        return DeviceBatches(config, job.source.train_on_devices(job.partitioner, discount), job.partitioner)
    log = job.source.train()
    statistics = batches.feedback_statistics(log, discount)
    return DeviceBatches(config, device_log.put(log, job.source.spec, statistics, job.partitioner), job.partitioner)


def _collected(job: _Job, policy: rankers.AnyRanker, number: int) -> batches.Batches:
    """Return the log of a round that a policy collects, in memory or on the devices."""
    if job.config.train.log_on_device:
        assert job.source.collect_on_devices is not None
        log = job.source.collect_on_devices(policy, number, job.partitioner, job.plan.agents.discount)
        return DeviceBatches(job.config, log, job.partitioner)
    assert job.source.collect is not None
    return batches.InMemoryBatches(job.config, job.source.collect(policy, number), job.partitioner)


def _server(job: _Job, state: TrainState) -> rankers.AnyRanker:
    """Return the policy that collects a round's log, local to this process: the agents as of the round's start, or the
    source's first policy.
    """
    method = registry.get(job.plan.method)
    if not method.collects:
        return next(iter(job.source.policies.values()))
    server = train_state.behavior_state(multihost.to_local(state))
    return method.make_policy(server, job.source.local().items, job.plan.agents, job.config.alternation.temperature)


# ---------------------------------------------------------------------------------------------------- State and restore


def _restored(job: _Job, checkpoints: manager.Checkpoints) -> tuple[TrainState | None, int, dict[str, Any] | None]:
    """Return the state to begin with, its step, and what learned.json says if training is complete.

    A run goes on from the first of these that it has:

    1. results.json and report.html: nothing is left to do (`_begun`); without the report, only that is written.
    2. learned.json: the newest checkpoint is the end of training, only the evaluation is left.
    3. A checkpoint: the newest intact one. Its `round` and `done` say where: `_round` skips the fits and updates done,
       `MetricsWriter` cuts metrics.jsonl back to its step, and the log of its round is collected again.
    4. Nothing: no state, step 0. The state is initialised when the first log is there (`_initial`).
    """
    if checkpoints.latest_step() is None:
        return None, 0, None
    state, step = checkpoints.restore(restore.state_shapes(job.config, job.source, job.partitioner))
    say(f"resumed at step {step}, round {min(int(state.round) + 1, job.plan.rounds)}")
    learned = multihost.on_primary(lambda: _read_if_exists(job.workdir / "learned.json"))
    return state, step, learned if learned is not None and learned["steps"] == step else None


def _initial(job: _Job, program: programs.Program, data: batches.Batches) -> TrainState:
    """Return a new state, scaled by the statistics of the first log."""
    job.compiled.wait("initial state", check, say)
    statistics = data.feedback_statistics(job.plan.agents.discount)
    state = program(*compilation.initial_args(job.config, job.plan, job.source, statistics))
    if job.config.init_from:
        state = warm_start.begin(job.config, inputs.of_source(job.source.local()), state, job.partitioner)
    return state


# --------------------------------------------------------------------------------------------------------------- Rounds


def _learn(
    job: _Job, state: TrainState | None, step: int, checkpoints: manager.Checkpoints
) -> tuple[TrainState, dict[str, Any]]:
    """Train the rounds that are left, from a state or a new one; return the last state and learned.json."""
    config, plan = job.config, job.plan
    shapes = restore.state_shapes(config, job.source, job.partitioner)
    memory.check(config, memory.estimate(config, plan, job.source, shapes, job.partitioner), job.partitioner)
    initial = compilation.initial(job.partitioner, shapes)
    compilation.begin(
        job.compiled, config, plan, job.source, shapes, initial if state is None else None, job.arms, job.partitioner
    )
    writes = job.workdir if multihost.is_primary() else None
    writer = _writer(config, writes, step if step else None)
    trace = profile.Profile(config.profile_steps, writes and writes / "profile")
    data: batches.Batches | None = None
    with writer, hooks.Hooks(config, writer, checkpoints, trace, step) as run_hooks:
        for number in range(0 if state is None else int(state.round), plan.rounds):
            if number and plan.closed_loop:
                data = None  # frees its memory before the next log is collected
            data = _log_of_round(job, state, number, data)
            if state is None:
                state = _initial(job, initial, data)
            logged = job.partitioner.replicate(np.array([data.sessions, data.requests], np.int32))
            state = dataclasses.replace(state, logged=logged)
            run_hooks.hold(state)
            state = _round(job, state, data, run_hooks)
            state = train_state.next_round(state)
            run_hooks.hold(state)
            run_hooks.save(force=True, again=True)
    checkpoints.wait()
    assert state is not None
    return state, multihost.on_primary(lambda: _write_learned(job, state, run_hooks.step))


def _round(job: _Job, state: TrainState, data: batches.Batches, run_hooks: hooks.Hooks) -> TrainState:
    """Train the rest of a round: fit the feedback model, measure it, update the agents, evaluate both."""
    config, number, done = job.config, int(state.round), int(state.done)

    def rate(progress: float) -> float:
        return steps.rate((number + progress) / job.plan.rounds)

    fit = None  # the steps of a round that are done are first its fits, then its updates
    if job.plan.use_feedback_model:
        fit = batches.PhaseIterator(data, "feedback", number, config.feedback.epochs, done, rate)
    updates = done if fit is None else max(done - fit.total, 0)
    update = batches.PhaseIterator(data, "train", number, config.train.epochs, updates, rate)
    if fit is not None:
        state = _fit(job, state, fit, run_hooks)
        if done <= fit.total:
            job.compiled.wait("measure", check, say)
            state = _measure(job, state, data)
            run_hooks.hold(state)
    state = _update(job, state, update, run_hooks)
    round_log = evaluate.Split("round", lambda: data.log)
    rows = {name: evaluator(job.trained(state), round_log) for name, evaluator in _EVALUATORS.items()}
    for name, metrics in rows.items():  # written last, after everything that can be interrupted
        if metrics is not None:
            run_hooks.write(name, metrics)
    return state


def _fit(job: _Job, state: TrainState, iterator: batches.PhaseIterator, run_hooks: hooks.Hooks) -> TrainState:
    """Fit the feedback model to the round's log."""
    _begin_phase(job, "fit", iterator, run_hooks)
    with iterator:
        for batch, rate in iterator:
            run_hooks.before_step()
            state, metrics = steps.fit_step(state, batch, job.source.items, job.plan, rate)
            run_hooks.after_step(state, metrics)
    return state


def _update(job: _Job, state: TrainState, iterator: batches.PhaseIterator, run_hooks: hooks.Hooks) -> TrainState:
    """Update the agents on the round's log, and on slates that the feedback model labels."""
    encodings = steps.precompute_item_embeddings(state, job.source.items, job.plan)
    encodings = None if encodings is None else job.partitioner.replicate(encodings)
    _begin_phase(job, "train", iterator, run_hooks)
    with iterator:
        for batch, rate in iterator:
            run_hooks.before_step()
            state, metrics = steps.update_step(state, batch, job.source.items, job.plan, rate, encodings)
            # The last state is saved at the end of the round.
            run_hooks.after_step(state, metrics, save=iterator.position < iterator.total)
    return state


def _begin_phase(job: _Job, name: str, iterator: batches.PhaseIterator, run_hooks: hooks.Hooks) -> None:
    if iterator.position < iterator.total:
        job.begin(name)
    run_hooks.begin(name, f"{name} {iterator.number + 1}/{job.plan.rounds}", iterator)


def _measure(job: _Job, state: TrainState, data: batches.Batches) -> TrainState:
    """Scale the feedback model's uncertainty on held-out sessions, or on validation days, which also calibrate it.

    Each process measures alone.
    """
    config, plan, source = job.config, job.plan, job.source
    size, exposures = config.feedback.batch, plan.feedback.exposures
    if source.valid is None:
        blocks = data.held_out(size, _MEASURED, exposures)
    else:
        log = source.valid()
        index = sessions.segment_index(log, config.train.segment)
        blocks = batches.measured(log, index, config.train.segment, size, _MEASURED, exposures)
    model = multihost.to_local(train_state.model_of(state))
    here = map(Partitioner.local().shard_inputs, blocks)
    found = fitting.measure(
        model, here, multihost.to_local(source.items), plan.feedback, calibrate=source.valid is not None
    )
    return dataclasses.replace(state, feedback=job.partitioner.replicate(found))


def _write_learned(job: _Job, state: TrainState, step: int) -> dict[str, Any]:
    """Write learned.json of a run that has finished training, and return its contents."""
    rows = [json.loads(line) for line in (job.workdir / "metrics.jsonl").read_text().splitlines()]

    def plain(row):
        return {name: value for name, value in row.items() if name != "seconds"}

    logged = np.asarray(state.logged).tolist()
    learned = {
        "steps": step,
        "updates": int(state.agents.step),
        "rounds": job.plan.rounds,
        "sessions_of_last_round": logged[0],
        "requests_of_last_round": logged[1],
        **{name: [plain(row) for row in rows if row["phase"] == name] for name in _EVALUATORS},
        "final": plain(next(row for row in reversed(rows) if row["phase"] == "train")),
    }
    files.write_json(job.workdir / "learned.json", learned)
    return learned


# ----------------------------------------------------------------------------------------------------------- Evaluation


def _exploitation_gap(run: evaluate.TrainedRun, split: evaluate.Split) -> dict[str, float] | None:
    if not (run.plan.use_feedback_model and run.config.alternation.gap_sessions and run.source.sim is not None):
        return None
    run.begin("model_exploitation_gap", "A/B test")
    return evaluate.model_exploitation_gap(run, split)


def _conflict(run: evaluate.TrainedRun, split: evaluate.Split) -> dict[str, float] | None:
    if not run.config.alternation.conflict_batches:
        return None
    run.begin("conflict")
    return run_report.conflicts(run.local(), split)


#: Evaluators of a round, (run, its log) -> a row of metrics.jsonl under this name; None if there is nothing to measure.
#: Those of held-out logs, at the end, are `evaluate.EVALUATORS`.
_EVALUATORS: dict[str, evaluate.Evaluator] = {
    "model_exploitation_gap": _exploitation_gap,
    "conflict": _conflict,
}


def _evaluate(job: _Job, state: TrainState, brief: bool) -> dict[str, Any]:
    """Compare the trained ranker with the other arms, then evaluate it on the held-out logs."""
    result: dict[str, Any] = {}
    run = job.trained(state)
    if run.source.sim is not None:
        run.begin("ab_test", "A/B test")
        result |= _ab_test(run, job.workdir)
    run.begin("offline")
    return result | evaluate.evaluate(run.local(), with_baselines=not brief)


def _ab_test(run: evaluate.TrainedRun, workdir: Path) -> dict[str, Any]:
    """Compare a run with the other arms; the per-user sums of its arm go to the run folder."""
    own = registry.get(run.plan.method).make_policy(run.state.agents, run.source.items, run.plan.agents)
    policies, blocks = {**run.arms, run.plan.method: own}, []
    result = evaluate.compare(
        run.config, run.source, policies, run.partitioner, observe=lambda sums: blocks.append(sums[run.plan.method])
    )
    if multihost.is_primary():
        run_folder.write_users(workdir, blocks)
    return result


# --------------------------------------------------------------------------------------------------------------- Report


def _writer(config: configs.Run, workdir: Path | None, start_step: int | None) -> metric_writer.MetricsWriter:
    return metric_writer.MetricsWriter(
        workdir, start_step, seed=config.seed, track=config.trackers, config=configs.as_dict(config)
    )


def _write_results(job: _Job, result: dict[str, Any], seconds: Callable[[], dict[str, float]]) -> None:
    """Write results.json, then this process's times, as a line and as a row of metrics.jsonl; both go to trackers."""
    files.write_json(job.workdir / "results.json", result)
    spent, step = seconds(), result["train"]["steps"]
    say(hooks.describe(spent))
    with _writer(job.config, job.workdir, step) as writer:
        writer.write(step, "time", {f"seconds_{kind}": round(value, 3) for kind, value in spent.items()})
        writer.summarise(run_report.headline(job.config, result))


def _report(config: configs.Run, source: sources.Source, state: TrainState, workdir: Path) -> None:
    """Write the run's report. The results are already saved, so any error here is only logged."""
    if (missing := run_report.missing()) is not None:
        say(f"no report: {missing}, then mmrf report --workdir={workdir}")
        return
    try:
        phase("report")
        page = run_report.write_report(config, source, state, workdir, thorough=False)
        say(f"report: {page}, a page for any browser")
    except Exception as error:
        fix = f"mmrf report --workdir={workdir} tries again"
        say(f"no report: {type(error).__name__}: {error}; {fix}")
