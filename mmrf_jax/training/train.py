"""The training loop: `train` reads from the set-up of a run to its report, its chapters follow in the same order.

Only this module drives the devices. docs/training-loop.md describes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
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
from mmrf_jax.io.progress import check, counted, interruptible, observed, phase, say
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
    side_by_side,
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
        spent = stack.enter_context(hooks.Times(compiled))
        stack.enter_context(observed(spent.begin))

        # ----------------------------------------------------------------------------------------------------- Data
        phase("prepare")
        jobs = _prepared(runs, results, partitioner, compiled)

        # ------------------------------------------------------------------------------- State, restore and rounds
        with contextlib.ExitStack() as opened:
            learners = [_restored(job, opened.enter_context(_checkpoints(job))) for job in jobs]
            _learn([learner for learner in learners if learner.learned is None], len(runs))

        # ---------------------------------------------------------------------------------------- Evaluation, report
        for learner in learners:
            results[learner.job.workdir] = _concluded(learner, brief, spent)
        return {workdir: results[workdir] for workdir in runs}


@dataclasses.dataclass(frozen=True)
class _Job:
    """What stays the same while a run is trained.

    Attributes:
      number: of the run, from 0, among those trained side by side.
      name: of the run in what is printed; "" for one alone.
      source: its items are replicated on the partitioner's devices.
      arms: the policies of the A/B test in addition to the run's own.
      compiled: compiles the run's programs ahead of their first calls.
    """

    config: configs.Run
    plan: steps.TrainConfig
    workdir: Path
    number: int
    name: str
    partitioner: Partitioner
    source: sources.Source
    arms: dict[str, rankers.AnyRanker]
    compiled: programs.Ahead

    def announce(self) -> None:
        """Say that what follows is done for this run alone, if it is one of several."""
        if self.name:
            say(self.name)

    def begin(self, name: str, program: str | None = None) -> None:
        """Announce a phase, and wait until its program is compiled (by default the one of the same name)."""
        phase(name)
        self.compiled.wait(program or name, check, say)

    def trained(self, state: TrainState) -> evaluate.TrainedRun:
        """Return the run as evaluators see it."""
        return evaluate.TrainedRun(self.config, self.plan, self.source, state, self.partitioner, self.arms, self.begin)


@dataclasses.dataclass
class _Learner:
    """What changes while a run is trained.

    Attributes:
      state: a TrainState; None in a new run until its first log is there.
      step: of the restored checkpoint; 0 without one.
      learned: what learned.json says, once training is complete.
      data: `batches.Batches` of the round; None before its log is there.
      run_hooks: of the steps.
    """

    job: _Job
    checkpoints: manager.Checkpoints
    state: Any = None
    step: int = 0
    learned: dict[str, Any] | None = None
    data: Any = None
    run_hooks: hooks.Hooks = dataclasses.field(init=False)

    def hold(self, state: TrainState) -> None:
        """Set the current state, which a stop signal saves."""
        self.state = state
        self.run_hooks.hold(state)


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
        configs.validate(configs.as_dict(config))
        config, log = own_logs.prepare(config, workdir, log)
        registry.configured(config.method, config.agents, config.plugins)
        profile.parse(config.profile_steps)
        trackers.check(config.trackers)
        partitioner.check_divisible(config.train.batch, "train.batch")
        partitioner.check_divisible(config.feedback.batch, "feedback.batch")
        if config.source == "world" and config.simulator == "world":
            _check_arms(config, sources.WORLD_ARMS)
        side_by_side.check(config, len(runs), partitioner)
        config = _with_plugins(config)
        if checked:
            config = dataclasses.replace(config, profile_steps="")  # a trace shows all runs, and one is taken at a time
        multihost.on_primary(functools.partial(warm_start.check, config, workdir))
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


def _prepared(
    runs: Mapping[Path, configs.Run], finished: Collection[Path], partitioner: Partitioner, compiled: programs.Ahead
) -> list[_Job]:
    """Open the source of each run that is not finished, and write what serving it needs; their world is shared."""
    jobs: list[_Job] = []
    for number, (workdir, config) in enumerate(runs.items()):
        if workdir in finished:
            continue
        like = jobs[0].source if jobs else None
        collects = config.alternation.closed_loop
        with preemption.at_once():
            source = restore.source_of(config, partitioner, collects=collects, workdir=workdir, like=like)
        plan = steps.plan_of(config, source.spec.signals)
        others = {} if source.sim is None else _arms(config, source)
        name = f"seed {config.seed}" if len(runs) > 1 else ""
        if source.report and not jobs:
            say(f"input: {json.dumps(source.report, default=str)}")
        if multihost.is_primary():
            inputs.write(workdir, inputs.of_source(source.local()))
        jobs.append(_Job(config, plan, workdir, number, name, partitioner, source, others, compiled))
    return jobs


def _log_of_round(job: _Job, state: TrainState | None, number: int, before: batches.Batches | None) -> batches.Batches:
    """Return the log of a round: that of the round before, the first policy's, or one that the agents collect.

    Args:
      state: at the beginning of the round; None in a new run.
      before: log of the round before; None in the first round of this process.
    """
    if before is not None:
        return before
    if number == 0 or not job.plan.closed_loop:
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
      ValueError: for a streamed log that is to stay on the devices, or of several runs.
    """
    config, discount, on_device = job.config, job.plan.agents.discount, job.config.train.log_on_device
    if (blocks := job.source.blocks()) is not None:
        if job.name:
            fix = "use --config.seeds=1, or --config.data.stream=False where memory allows"
            raise ValueError(f"seeds are side by side, but the log is streamed; {fix}")
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


def _checkpoints(job: _Job) -> manager.Checkpoints:
    return manager.Checkpoints(
        job.workdir / "checkpoints",
        keep=_KEEP,
        save_interval=job.config.checkpoint_every,
        agree=multihost.on_primary,
    )


def _restored(job: _Job, checkpoints: manager.Checkpoints) -> _Learner:
    """Return the state to begin with, its step, and what learned.json says if training is complete.

    A run goes on from the first of these that it has:

    1. results.json and report.html: nothing is left to do (`_begun`); without the report, only that is written.
    2. learned.json: the newest checkpoint is the end of training, only the evaluation is left.
    3. A checkpoint: the newest intact one. Its `round` and `done` say where: `_round` skips the fits and updates done,
       `MetricsWriter` cuts metrics.jsonl back to its step, and the log of its round is collected again.
    4. Nothing: no state, step 0. The state is initialised when the first log is there (`_initial`).
    """
    if checkpoints.latest_step() is None:
        return _Learner(job, checkpoints)
    job.announce()
    state, step = checkpoints.restore(restore.state_shapes(job.config, job.source, job.partitioner))
    say(f"resumed at step {step}, round {min(int(state.round) + 1, job.plan.rounds)}")
    learned = multihost.on_primary(lambda: _read_if_exists(job.workdir / "learned.json"))
    return _Learner(job, checkpoints, state, step, learned if learned and learned["steps"] == step else None)


def _initial(job: _Job, program: programs.Program, data: batches.Batches) -> TrainState:
    """Return a new state, scaled by the statistics of the first log."""
    job.compiled.wait("initial state", check, say)
    statistics = data.feedback_statistics(job.plan.agents.discount)
    state = program(*compilation.initial_args(job.config, job.plan, job.source, statistics))
    if job.config.init_from:
        state = warm_start.begin(job.config, inputs.of_source(job.source.local()), state, job.partitioner)
    return state


# --------------------------------------------------------------------------------------------------------------- Rounds


def _learn(learners: Sequence[_Learner], number: int) -> None:
    """Train the rounds that are left to runs, from their states or new ones; `number` runs are side by side.

    Each run has all that it has alone: log, hooks and checkpoints. Only the steps of a phase are taken together. Runs
    that were killed may be at different steps; those ahead wait for the others at the end of a phase.
    """
    if not learners:
        return
    job = learners[0].job
    config, plan = job.config, job.plan
    shapes = restore.state_shapes(config, job.source, job.partitioner)
    found = memory.estimate(config, plan, job.source, shapes, job.partitioner, number)
    memory.check(config, found, job.partitioner, number)
    seeds, initial = side_by_side.Seeds(number, shapes, job.partitioner), compilation.initial(job.partitioner, shapes)
    new = any(learner.state is None for learner in learners)
    compilation.begin(job.compiled, config, plan, job.source, seeds, initial if new else None, job.arms)
    with contextlib.ExitStack() as opened:
        for learner in learners:
            learner.run_hooks = opened.enter_context(_hooks(opened, learner))
        for at in range(min(_round_of(learner) for learner in learners), plan.rounds):
            here = [learner for learner in learners if _round_of(learner) == at]
            if at and plan.closed_loop:
                for learner in here:
                    learner.data = None  # frees its memory before the next log is collected
            for learner in here:
                _begin_round(learner, at, initial)
            _round(here, at, seeds)
            for learner in here:
                learner.hold(train_state.next_round(learner.state))
                learner.run_hooks.save(force=True, again=True)
    for learner in learners:
        learner.data = None
        learner.checkpoints.wait()
        step = learner.run_hooks.step
        learner.learned = multihost.on_primary(functools.partial(_write_learned, learner.job, learner.state, step))


def _hooks(opened: contextlib.ExitStack, learner: _Learner) -> hooks.Hooks:
    """Return the hooks of a run's steps; its metrics are written until the stack closes."""
    job, step = learner.job, learner.step
    writes = job.workdir if multihost.is_primary() else None
    writer = opened.enter_context(_writer(job.config, writes, step if step else None))
    trace = profile.Profile(job.config.profile_steps, writes and writes / "profile")
    return hooks.Hooks(job.config, writer, learner.checkpoints, trace, step, job.name)


def _round_of(learner: _Learner) -> int:
    return 0 if learner.state is None else int(learner.state.round)


def _begin_round(learner: _Learner, number: int, initial: programs.Program) -> None:
    """Give a run the log of a round, and a new run its state."""
    job = learner.job
    job.announce()
    learner.data = data = _log_of_round(job, learner.state, number, learner.data)
    state = _initial(job, initial, data) if learner.state is None else learner.state
    logged = job.partitioner.replicate(np.array([data.sessions, data.requests], np.int32))
    learner.hold(dataclasses.replace(state, logged=logged))


def _round(learners: Sequence[_Learner], number: int, seeds: side_by_side.Seeds) -> None:
    """Train the rest of a round: fit the feedback model, measure it, update the agents, evaluate both."""
    plan = learners[0].job.plan
    # The steps of a round that are done are first its fits, then its updates.
    done = [int(learner.state.done) for learner in learners]
    fits: list[batches.PhaseIterator] = []
    if plan.use_feedback_model:
        fits = [_iterator(learner, "feedback", number, at) for learner, at in zip(learners, done, strict=True)]
    fitted = [fit.total for fit in fits] or [0] * len(learners)
    updates = [
        _iterator(learner, "train", number, max(at - total, 0))
        for learner, at, total in zip(learners, done, fitted, strict=True)
    ]
    if fits:
        _steps(learners, fits, seeds, "fit", steps.fit_step, save_last=True)
        for learner, at, total in zip(learners, done, fitted, strict=True):
            if at <= total:
                learner.job.compiled.wait("measure", check, say)
                learner.hold(_measure(learner.job, learner.state, learner.data))
    encodings = seeds.join({learner.job.number: _encodings(learner) for learner in learners})
    # The last state is saved at the end of the round.
    _steps(learners, updates, seeds, "train", steps.update_step, save_last=False, more=(encodings,))
    rows = [_evaluated(learner) for learner in learners]
    for learner, found in zip(learners, rows, strict=True):  # written last, after everything that can be interrupted
        for name, metrics in found.items():
            learner.run_hooks.write(name, metrics)


def _iterator(learner: _Learner, part: str, number: int, done: int) -> batches.PhaseIterator:
    """Return the batches of a phase of a round after `done` steps, with the learning-rate factors of the whole run."""
    config, rounds = learner.job.config, learner.job.plan.rounds
    epochs = getattr(config, part).epochs
    return batches.PhaseIterator(
        learner.data, part, number, epochs, done, lambda progress: steps.rate((number + progress) / rounds)
    )


def _encodings(learner: _Learner) -> Any:
    """Return the encodings of all videos by the fitted feedback model; None if updates encode their candidates."""
    job = learner.job
    encodings = steps.precompute_item_embeddings(learner.state, job.source.items, job.plan)
    return None if encodings is None else job.partitioner.replicate(encodings)


def _steps(
    learners: Sequence[_Learner],
    iterators: Sequence[batches.PhaseIterator],
    seeds: side_by_side.Seeds,
    name: str,
    program: programs.Program,
    save_last: bool,
    more: tuple = (),
) -> None:
    """Take the steps of a phase that are left to each run, a step of all runs at a time, with their hooks.

    Args:
      iterators: of the runs.
      name: of the phase.
      program: takes a step of one run.
      save_last: whether the state after a run's last step may be saved.
      more: further arguments of the program, joined.
    """
    left = [pair for pair in zip(learners, iterators, strict=True) if pair[1].position < pair[1].total]
    if not left:
        return
    job = left[0][0].job
    job.begin(name)
    longest = max((iterator for _, iterator in left), key=lambda iterator: iterator.total - iterator.position)
    progress = counted(f"{name} {longest.number + 1}/{job.plan.rounds}", longest.total, done=longest.position)
    states = seeds.join({learner.job.number: learner.state for learner, _ in left})
    with contextlib.ExitStack() as opened:
        for learner, iterator in left:
            learner.state = None  # its memory is the steps' now
            learner.run_hooks.begin(name, iterator)
            opened.enter_context(iterator)
        while left:
            taken = {learner.job.number: next(iterator) for learner, iterator in left}
            for learner, _ in left:
                learner.run_hooks.before_step()
            states, metrics = seeds.step(program, states, taken, job.source.items, job.plan, *more)
            for learner, iterator in left:
                number, more_left = learner.job.number, iterator.position < iterator.total
                state = functools.partial(seeds.take, states, number)
                logged = functools.partial(seeds.metrics_of, metrics, number)
                learner.run_hooks.after_step(state, logged, save=save_last or more_left)
                if not more_left:
                    learner.hold(state())
            left = [pair for pair in left if pair[1].position < pair[1].total]
            progress(longest.position)  # checks for a stop signal, when all hooks have the states of this step


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


def _evaluated(learner: _Learner) -> dict[str, dict[str, Any]]:
    """Return the rows of a round's evaluators."""
    data, run = learner.data, learner.job.trained(learner.state)
    round_log = evaluate.Split("round", lambda: data.log)
    rows = {name: evaluator(run, round_log) for name, evaluator in _EVALUATORS.items()}
    return {name: metrics for name, metrics in rows.items() if metrics is not None}


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


def _concluded(learner: _Learner, brief: bool, spent: hooks.Times) -> dict[str, Any]:
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
            source, state = job.source.local(), multihost.to_local(state)
            source.test()  # a collective operation if the test log has not been collected yet
            preemption.part()
            if multihost.is_primary():
                _report(job.config, source, state, job.workdir)
    return result


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
