"""The rounds of training: logs, fits of the feedback model, updates of the agents, evaluators after each round.

`train_rounds` trains one run, or several side by side: all is done for one after another but the steps of a phase.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrf_jax.agents import registry
from mmrf_jax.checkpointing import manager
from mmrf_jax.data import device_log, sessions
from mmrf_jax.envs import rankers
from mmrf_jax.io import files, metric_writer, profile
from mmrf_jax.io.progress import check_interrupted, counted, phase, say
from mmrf_jax.models.feedback_model import fitting
from mmrf_jax.parallel import multihost, preemption, programs
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import (
    batches,
    compilation,
    config_sections,
    configs,
    evaluate,
    hooks,
    inputs,
    memory,
    restore,
    run_report,
    side_by_side,
    simulated_tests,
    sources,
    steps,
    train_state,
    warm_start,
)
from mmrf_jax.training.on_device import DeviceBatches
from mmrf_jax.training.train_state import TrainState
from mmrf_jax.training.trained_run import TrainedRun

_MEASURED = 16  # batches of held-out sessions on which the feedback model is measured


@dataclasses.dataclass(frozen=True)
class TrainingJob:
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
        self.compiled.wait(program or name, check_interrupted, say)

    def trained(self, state: TrainState) -> TrainedRun:
        """Return the run as evaluators see it."""
        return TrainedRun(self.source, self.plan, state, self.partitioner, self.arms, self.begin)


@dataclasses.dataclass
class Learner:
    """What changes while a run is trained.

    Attributes:
      state: a TrainState; None in a new run until its first log is there.
      step: of the restored checkpoint; 0 without one.
      learned: what learned.json says, once training is complete.
      data: `batches.Batches` of the round; None before its log is there.
      run_hooks: of the steps.
    """

    job: TrainingJob
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


def train_rounds(learners: Sequence[Learner], number: int) -> None:
    """Train the rounds that are left to runs, from their states or new ones; `number` runs are side by side.

    Each run has all that it has alone: log, hooks and checkpoints. Only the steps of a phase are taken together. Runs
    that were killed may be at different steps; those ahead wait for the others at the end of a phase.
    """
    if not learners:
        return
    job = learners[0].job
    config, plan = job.config, job.plan
    shapes = restore.state_shapes(config, job.source, job.partitioner)
    found = memory.estimate_memory(config, plan, job.source, shapes, job.partitioner, number)
    memory.check_memory(config, found, job.partitioner, number)
    seeds, initial = (
        side_by_side.Seeds(number, shapes, job.partitioner),
        compilation.init_program(job.partitioner, shapes),
    )
    new = any(learner.state is None for learner in learners)
    compilation.compile_ahead(job.compiled, config, plan, job.source, seeds, initial if new else None, job.arms)
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


def open_writer(config: configs.Run, workdir: Path | None, start_step: int | None) -> metric_writer.MetricsWriter:
    """Open the metrics of a run; arguments as of `MetricsWriter`."""
    return metric_writer.MetricsWriter(
        workdir, start_step, seed=config.seed, track=config.trackers, config=configs.as_dict(config)
    )


def _hooks(opened: contextlib.ExitStack, learner: Learner) -> hooks.Hooks:
    """Return the hooks of a run's steps; its metrics are written until the stack closes."""
    job, step = learner.job, learner.step
    writes = job.workdir if multihost.is_primary() else None
    writer = opened.enter_context(open_writer(job.config, writes, step if step else None))
    trace = profile.Profile(job.config.profile_steps, writes and writes / "profile")
    return hooks.Hooks(job.config, writer, learner.checkpoints, trace, step, job.name)


def _round_of(learner: Learner) -> int:
    return 0 if learner.state is None else int(learner.state.round)


def _begin_round(learner: Learner, number: int, initial: programs.Program) -> None:
    """Give a run the log of a round, and a new run its state."""
    job = learner.job
    job.announce()
    learner.data = data = _log_of_round(job, learner.state, number, learner.data)
    state = _initial(job, initial, data) if learner.state is None else learner.state
    logged = job.partitioner.replicate(np.array([data.sessions, data.requests], np.int32))
    learner.hold(dataclasses.replace(state, logged=logged))


# ----------------------------------------------------------------------------------------------------------------- Logs


def _log_of_round(
    job: TrainingJob, state: TrainState | None, number: int, before: batches.Batches | None
) -> batches.Batches:
    """Return the log of a round: that of the round before, the first policy's, or one that the agents collect.

    Args:
      state: at the beginning of the round; None in a new run.
      before: log of the round before; None in the first round of this process.
    """
    if before is not None:
        return before
    if number == 0 or not job.plan.closed_loop:
        if job.source.sim is not None:
            given = isinstance(job.config.data, config_sections.OwnLogs) or job.config.data.dir
            phase("read" if given else "collect")
        with preemption.at_once():
            return _first_log(job)
    phase("collect")
    assert state is not None
    with preemption.at_once():
        return _collected(job, _behavior_policy(job, state), number)


def _first_log(job: TrainingJob) -> batches.Batches:
    """Return the log of a run's first round, or of all its rounds: collected or read, in memory or streamed.

    Raises:
      ValueError: for a streamed log that is to stay on the devices, or of several runs; for one with random slates
        that is to stay on the devices, with a feedback model.
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
    if job.plan.use_feedback_model and job.plan.feedback.exposures == 2 and job.source.valid is None:
        raise ValueError(
            "config.train.log_on_device=True, but the feedback model is measured apart on requests with random slates; "
            "use --config.train.log_on_device=False"
        )
    if job.source.train_on_devices is not None:
        return DeviceBatches(config, job.source.train_on_devices(job.partitioner, discount), job.partitioner)
    log = job.source.train()
    statistics = batches.feedback_statistics(log, discount)
    return DeviceBatches(config, device_log.put(log, job.source.spec, statistics, job.partitioner), job.partitioner)


def _collected(job: TrainingJob, policy: rankers.AnyRanker, number: int) -> batches.Batches:
    """Return the log of a round that a policy collects, in memory or on the devices."""
    if job.config.train.log_on_device:
        assert job.source.collect_on_devices is not None
        log = job.source.collect_on_devices(policy, number, job.partitioner, job.plan.agents.discount)
        return DeviceBatches(job.config, log, job.partitioner)
    assert job.source.collect is not None
    return batches.InMemoryBatches(job.config, job.source.collect(policy, number), job.partitioner)


def _behavior_policy(job: TrainingJob, state: TrainState) -> rankers.AnyRanker:
    """Return the policy that collects a round's log, local to this process: the agents as of the round's start, or the
    source's first policy.
    """
    method = registry.get(job.plan.method)
    if not method.collects_on_policy:
        return next(iter(job.source.policies.values()))
    behavior = train_state.behavior_state(multihost.to_local(state))
    return method.make_policy(behavior, job.source.local().items, job.plan.agents, job.config.alternation.temperature)


def _initial(job: TrainingJob, program: programs.Program, data: batches.Batches) -> TrainState:
    """Return a new state, scaled by the statistics of the first log."""
    job.compiled.wait("initial state", check_interrupted, say)
    statistics = data.feedback_statistics(job.plan.agents.discount)
    state = program(*compilation.init_args(job.config, job.plan, job.source, statistics))
    if job.config.init_from:
        state = warm_start.begin_from_run(
            job.config, inputs.inputs_of_source(job.source.local()), state, job.partitioner
        )
    return state


# -------------------------------------------------------------------------------------------------------------- A round


def _round(learners: Sequence[Learner], number: int, seeds: side_by_side.Seeds) -> None:
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
                learner.job.compiled.wait("measure", check_interrupted, say)
                learner.hold(_measure(learner.job, learner.state, learner.data))
    encodings = seeds.join({learner.job.number: _encodings(learner) for learner in learners})
    # The last state is saved at the end of the round.
    _steps(learners, updates, seeds, "train", steps.update_step, save_last=False, more=(encodings,))
    rows = [_evaluated(learner) for learner in learners]
    for learner, found in zip(learners, rows, strict=True):  # written last, after everything that can be interrupted
        for name, metrics in found.items():
            learner.run_hooks.write(name, metrics)


def _iterator(learner: Learner, part: str, number: int, done: int) -> batches.PhaseIterator:
    """Return the batches of a phase of a round after `done` steps, with the learning-rate factors of the whole run."""
    config, rounds = learner.job.config, learner.job.plan.rounds
    epochs = getattr(config, part).epochs
    return batches.PhaseIterator(
        learner.data, part, number, epochs, done, lambda progress: steps.lr_scale_at((number + progress) / rounds)
    )


def _encodings(learner: Learner) -> Any:
    """Return the encodings of all videos by the fitted feedback model; None if updates encode their candidates."""
    job = learner.job
    encodings = steps.precompute_item_embeddings(learner.state, job.source.items, job.plan)
    return None if encodings is None else job.partitioner.replicate(encodings)


def _steps(
    learners: Sequence[Learner],
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


def _measure(job: TrainingJob, state: TrainState, data: batches.Batches) -> TrainState:
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
        blocks = batches.measured_batches(log, index, config.train.segment, size, _MEASURED, exposures)
    model = multihost.to_local(train_state.model_of(state))
    here = map(Partitioner.local().shard_inputs, blocks)
    found = fitting.measure(
        model, here, multihost.to_local(source.items), plan.feedback, calibrate=source.valid is not None
    )
    return dataclasses.replace(state, feedback=job.partitioner.replicate(found))


# -------------------------------------------------------------------------------------------------------- After a round


def _evaluated(learner: Learner) -> dict[str, dict[str, Any]]:
    """Return the rows of a round's evaluators."""
    data, run = learner.data, learner.job.trained(learner.state)
    round_log = evaluate.Split("round", lambda: data.log)
    rows = {name: evaluator(run, round_log) for name, evaluator in EVALUATORS.items()}
    return {name: metrics for name, metrics in rows.items() if metrics is not None}


def _exploitation_gap(run: TrainedRun, split: evaluate.Split) -> dict[str, float] | None:
    if not (run.plan.use_feedback_model and run.config.alternation.gap_sessions and run.source.sim is not None):
        return None
    run.begin("model_exploitation_gap", "A/B test")
    return simulated_tests.model_exploitation_gap(run, split.log)


def _conflict(run: TrainedRun, split: evaluate.Split) -> dict[str, float] | None:
    if not run.config.alternation.conflict_batches:
        return None
    run.begin("conflict")
    return run_report.conflicts(run.local(), split.log)


#: Evaluators of a round, (run, its log) -> a row of metrics.jsonl under this name; None if there is nothing to measure.
#: Those of held-out logs, at the end, are `evaluate.EVALUATORS`.
EVALUATORS: dict[str, evaluate.Evaluator] = {
    "model_exploitation_gap": _exploitation_gap,
    "conflict": _conflict,
}


def _write_learned(job: TrainingJob, state: TrainState, step: int) -> dict[str, Any]:
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
        **{name: [plain(row) for row in rows if row["phase"] == name] for name in EVALUATORS},
        "final": plain(next(row for row in reversed(rows) if row["phase"] == "train")),
    }
    files.write_json(job.workdir / "learned.json", learned)
    return learned
