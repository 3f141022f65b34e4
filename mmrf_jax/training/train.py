"""The host loop: collect or load logs, learn, compare, write results. The only place that drives the device."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax.agents import registry
from mmrf_jax.checkpointing import manager
from mmrf_jax.data import sessions, stream
from mmrf_jax.data.schema import SessionLog
from mmrf_jax.envs import base
from mmrf_jax.io import files, metric_writer, profile
from mmrf_jax.io.progress import check, counted, interruptible, observed, phase, say
from mmrf_jax.models.feedback_model import fitting
from mmrf_jax.parallel import multihost, preemption, programs, sharding
from mmrf_jax.training import (
    batches,
    compilation,
    configs,
    evaluate,
    restore,
    run_folder,
    run_report,
    sources,
    steps,
    times,
)

_KEEP = 3
_LARGE = 2**22  # entries of an array; larger ones are looked through where they live
_MEASURED = 16  # batches of sessions left out of the fit, on which the feedback model is measured


def train(config: configs.Run, workdir: Path, brief: bool = False) -> dict[str, Any]:
    """Runs a config to its results, going on from the newest checkpoint of the folder. Returns the results.

    Args:
      brief: whether to leave out the report, which `launch.report` writes later, and on real logs the simple rankers
        beside the run's own, as in a study.
    """
    # What is wrong with the config is said before anything is written.
    configs.validate(configs.as_dict(config))
    registry.get(config.method)
    profile.parse(config.profile_steps)
    mesh = sharding.make_mesh()
    sharding.check_divisible(config.train.batch, mesh, "train.batch")
    sharding.check_divisible(config.feedback.batch, mesh, "feedback.batch")
    plan = steps.plan_of(config)
    if config.source == "world" and config.simulator == "world":
        _arms(config, sources.world_policies())
    with contextlib.ExitStack() as stack:  # in the first process it holds the folder
        finished = multihost.on_primary(lambda: _begun(stack, workdir, config, brief))
        if finished is not None:
            say(f"{workdir} is finished; nothing to do")
            return finished
        with (
            contextlib.closing(programs.Ahead()) as compiled,
            preemption.watching() as watch,
            interruptible(watch.check),
            times.Times(compiled) as spent,
            observed(spent.begin),
        ):
            return _run(config, plan, workdir, mesh, brief, compiled, spent)


def _begun(stack: contextlib.ExitStack, workdir: Path, config, brief: bool) -> dict[str, Any] | None:
    """The results of a finished run; of another, None, and its folder is held until the stack is closed."""
    results = _kept(workdir / "results.json")
    if results is not None and (brief or (workdir / "report.html").exists() or not run_folder.has_checkpoint(workdir)):
        run_folder.check(workdir, configs.as_dict(config))
        return results
    stack.enter_context(run_folder.claimed(workdir, configs.as_dict(config)))
    return None


def _kept(path: Path) -> dict[str, Any] | None:
    """What an earlier start has left in a JSON file of the run; None where it has not."""
    return run_folder.read_json(path) if path.exists() else None


def check_arms(names: Iterable[str], policies: Collection[str], field: str) -> None:
    """Refuses names of a config's field that are no policies.

    Raises:
      ValueError: for the first of them.
    """
    for name in names:
        if name not in policies:
            raise ValueError(f"unknown arm {name!r} in {field}; choose among {', '.join(policies)}")


def _run(
    config, plan: steps.TrainConfig, workdir: Path, mesh, brief: bool, compiled: programs.Ahead, spent: times.Times
) -> dict[str, Any]:
    """Everything between a claimed folder and its results. What is judged by each process alone, all judge alike."""
    phase("prepare")
    with preemption.at_once():
        source = restore.source_of(config, mesh, collects=plan.closed_loop)
    if source.report:
        say(f"input: {json.dumps(source.report, default=str)}")
    policies = {} if source.sim is None else _arms(config, source.policies)
    with manager.Checkpoints(
        workdir / "checkpoints", keep=_KEEP, save_interval=config.checkpoint_every, agree=multihost.on_primary
    ) as checkpoints:
        state, metrics = _learn(config, source, plan, workdir, checkpoints, mesh, compiled, policies)
    result = multihost.on_primary(lambda: _kept(workdir / "results.json"))  # of a start that was stopped at the report
    with preemption.at_once():
        if result is None:
            result = {"train": metrics} | _judged(config, source, plan, policies, state, mesh, brief, compiled)
            phase("results")
            if sharding.is_primary():
                files.write_json(workdir / "results.json", result)
                _write_times(config, workdir, metrics["steps"], spent.seconds())
        if not brief:
            source, state = _alone(source), sharding.local(state)
            source.test()  # is collected by all together, where nothing has asked for it yet
            preemption.part()
            if sharding.is_primary():
                _report(config, source, state, workdir)
    return result


def _write_times(config: configs.Run, workdir: Path, step: int, seconds: dict[str, float]) -> None:
    """Says where the seconds of this start went, in a line and in a row of metrics.jsonl."""
    say(times.describe(seconds))
    with metric_writer.MetricsWriter(workdir, start_step=step, seed=config.seed) as writer:
        writer.write(step, "time", {f"seconds_{kind}": round(value, 3) for kind, value in seconds.items()})


def _judged(
    config, source, plan: steps.TrainConfig, policies, state, mesh, brief: bool, compiled: programs.Ahead
) -> dict[str, Any]:
    """The results of a trained state: the A/B test where there is a simulator, then what is measured offline."""
    result: dict[str, Any] = {}
    if source.sim is not None:
        phase("ab_test")
        compiled.wait("A/B test", check, say)
        own = registry.get(plan.method).make_policy(state.agents, source.items, plan.agents)
        result |= evaluate.compare(config, source, policies | {config.method: own}, mesh)
    phase("offline")
    compiled.wait("offline", check, say)
    return result | evaluate.evaluate(
        config, _alone(source), sharding.local(state), sharding.local_mesh(), beside=not brief
    )


def _alone(source: sources.Source) -> sources.Source:
    """A source for what this process computes without the others."""
    return dataclasses.replace(source, items=sharding.local(source.items))


def _report(config: configs.Run, source: sources.Source, state: steps.TrainState, workdir: Path) -> None:
    """Writes the run's report. The results are kept by now, so whatever goes wrong here is said and no more."""
    try:
        phase("report")
        run_report.write_report(config, source, state, workdir, thorough=False)
    except Exception as error:
        fix = f"python -m launch.report --workdir={workdir} tries again"
        say(f"no report: {type(error).__name__}: {error}; {fix}")


def _arms(config: configs.Run, policies: dict[str, base.Policy]) -> dict[str, base.Policy]:
    """The arms of the config beside the run's own ranker, which joins by itself."""
    names = [name for name in config.ab_test.arms if name != config.method]
    check_arms(names, policies, "config.ab_test.arms")
    return {name: policies[name] for name in names}


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _finite(tree) -> bool:
    """Whether every floating-point number of a state is finite; all processes find the same."""
    for x in jax.tree.leaves(tree):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        # On the host a small array needs no program of its own; a large one may live in parts elsewhere.
        small = x.size <= _LARGE and x.is_fully_replicated
        if not (np.isfinite(np.asarray(x)).all() if small else _all_finite(x)):
            return False
    return True


def _learn(
    config: configs.Run,
    source,
    plan: steps.TrainConfig,
    workdir: Path,
    checkpoints: manager.Checkpoints,
    mesh,
    compiled: programs.Ahead,
    policies: dict[str, base.Policy],
):
    """The rounds of a run, from the newest checkpoint or a fresh state to the last update."""
    state: Any = None
    summary: dict[str, Any] | None
    step, shapes = 0, restore.state_shapes(config, source, mesh)
    if checkpoints.latest_step() is not None:
        state, step = checkpoints.restore(shapes)
        say(f"resumed at step {step}, round {min(int(state.round) + 1, plan.rounds)}")
        summary = multihost.on_primary(lambda: _kept(workdir / "learned.json"))
        if summary is not None and summary["steps"] == step:
            return state, summary
    start = compilation.initial(shapes) if state is None else None
    compilation.begin(compiled, config, plan, source, shapes, start, policies, mesh)
    writes = workdir if sharding.is_primary() else None
    writer = metric_writer.MetricsWriter(writes, start_step=step if step else None, seed=config.seed)
    keeper = _Keeper(config, writer, checkpoints, step)
    traced = profile.Profile(config.profile_steps, writes and writes / "profile")
    given: batches.Batches | None = None
    with writer, keeper, contextlib.closing(traced):
        for number in range(0 if state is None else int(state.round), plan.rounds):
            if number == 0 or not plan.closed_loop:
                if given is None:
                    if source.sim is not None:
                        phase("read" if config.data.dir else "collect")
                    with preemption.at_once():
                        given = _given(config, plan, source, mesh)
                data = given
            else:
                phase("collect")
                with preemption.at_once():
                    data = batches.Held(config, source.collect(_server(config, plan, source, state), number), mesh)
            if start is not None:
                compiled.wait("initial state", check, say)
                state = start(*compilation.initial_args(config, plan, source, data.known(plan.agents.discount)))
                start = None
            logged = sharding.put_replicated(np.array([data.sessions, data.requests], np.int32), mesh)
            state = dataclasses.replace(state, logged=logged)
            keeper.hold(state)
            state = _round(config, source, plan, state, data, keeper, traced, mesh, compiled, policies)
            state = steps.next_round(state)
            keeper.hold(state)
            keeper.save(force=True, again=True)
    checkpoints.wait()
    summary = multihost.on_primary(lambda: _summarise(plan, state, workdir, keeper.step))
    return state, summary


def _summarise(plan: steps.TrainConfig, state: steps.TrainState, workdir: Path, step: int) -> dict[str, Any]:
    """Writes learned.json of a run that has learned to its end, and gives it."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]

    def plain(row):
        return {name: value for name, value in row.items() if name != "seconds"}

    logged = np.asarray(state.logged).tolist()
    summary = {
        "steps": step,
        "updates": int(state.agents.step),
        "rounds": plan.rounds,
        "sessions_of_last_round": logged[0],
        "requests_of_last_round": logged[1],
        "optimism": [plain(row) for row in rows if row["phase"] == "optimism"],
        "conflict": [plain(row) for row in rows if row["phase"] == "conflict"],
        "final": plain(next(row for row in reversed(rows) if row["phase"] == "train")),
    }
    files.write_json(workdir / "learned.json", summary)
    return summary


def _server(
    config: configs.Run, plan: steps.TrainConfig, source: sources.Source, state: steps.TrainState
) -> base.Policy:
    """Who collects a round's log, in each process alone: the agents as they were when it began, or the source's first
    policy."""
    method = registry.get(plan.method)
    if not method.collects:
        return next(iter(source.policies.values()))
    server = steps.behavior_state(sharding.local(state))
    return method.make_policy(server, _alone(source).items, plan.agents, config.alternation.temperature)


def _given(config: configs.Run, plan: steps.TrainConfig, source: sources.Source, mesh) -> batches.Batches:
    """The log of the first round, or of all: read as it is trained on where the source says so."""
    if (blocks := source.blocks()) is not None:
        return batches.Streamed(config, blocks, mesh, plan.agents.discount)
    return batches.Held(config, source.train(), mesh)


class _Keeper:
    """Writes metrics and checkpoints of a run as its steps go by; no state that is not finite is saved.

    As a context manager it saves the state that it holds where the run is told to stop.
    """

    def __init__(
        self, config: configs.Run, writer: metric_writer.MetricsWriter, checkpoints: manager.Checkpoints, step: int
    ):
        self.step = step  # of the whole run: steps of fits and updates
        self._config, self._writer, self._checkpoints = config, writer, checkpoints
        self._state: Any = None
        self._pending: tuple[int, str, Any] | None = None
        self._good = step  # the last step whose metrics were seen to be finite

    def __enter__(self) -> _Keeper:
        return self

    def __exit__(self, kind, *_: object) -> None:
        if kind is preemption.Preempted and self._state is not None:
            self.save(force=True)
            self._checkpoints.wait()
            say(f"saved step {self.step}")

    def hold(self, state) -> None:
        """The run's state from here on."""
        self._state = state

    def after_step(self, phase: str, metrics, last: bool) -> None:
        self.step += 1
        if self.step % self._config.log_every == 0 or last:
            # The metrics of the logging step before: reading them does not wait for the device.
            self.flush()
            self._pending = (self.step, phase, metrics)
        if last:
            self.flush()

    def flush(self) -> None:
        """Writes the metrics that are still on the device."""
        if self._pending is None:
            return
        (at, phase, metrics), self._pending = self._pending, None
        self.write(phase, jax.device_get(metrics), at)

    def write(self, phase: str, metrics, at: int | None = None) -> None:
        at = self.step if at is None else at
        try:
            self._writer.write(at, phase, metrics)
        except FloatingPointError as error:
            raise FloatingPointError(f"steps {self._good + 1} to {at}: {error}") from error
        self._good = at

    def save(self, force: bool = False, again: bool = False) -> None:
        if not force and self.step % self._config.checkpoint_every:
            return
        self.flush()
        if not _finite(self._state):
            first = min(self._good + 1, self.step)  # its metrics may be finite all the same
            raise FloatingPointError(
                f"steps {first} to {self.step}: the state after step {self.step} is not finite and is not "
                "saved; lower the learning rate"
            )
        self._checkpoints.save(self.step, self._state, force=force, again=again)


def _round(
    config: configs.Run,
    source,
    plan: steps.TrainConfig,
    state,
    data: batches.Batches,
    keeper: _Keeper,
    traced,
    mesh,
    compiled: programs.Ahead,
    policies: dict[str, base.Policy],
):
    """One round: the steps that are left of its fit and its updates, then the optimism gap."""
    number, done = int(state.round), int(state.done)
    of_fit = config.feedback.epochs * data.per_epoch("feedback") if plan.use_feedback_model else 0
    of_updates = config.train.epochs * data.per_epoch("train")

    def run(state, name: str, part: str, step, first: int, total: int):
        """Steps `first` … `total - 1` of a phase of this round, at rates that fall along the whole run."""
        if first < total:
            phase(name)
            compiled.wait(name, check, say)
        update = counted(f"{name} {number + 1}/{plan.rounds}", total, done=first)
        with stream.ahead(lambda at: data.get(part, number, at), first, total) as coming:
            for at, batch in enumerate(coming, first):
                rate = np.float32(steps.rate((number + at / total) / plan.rounds))
                traced.before(keeper.step + 1)
                state, metrics = step(state, sharding.put_batch(batch, mesh), source.items, plan, rate)
                keeper.hold(state)
                traced.after(keeper.step + 1, state)
                keeper.after_step(name, metrics, last=at + 1 == total)
                if name == "fit" or at + 1 < total:  # the last update is saved when the round is over
                    keeper.save()
                update(at + 1)
        return state

    if plan.use_feedback_model:
        state = run(state, "fit", "feedback", steps.fit_step, done, of_fit)
        if done <= of_fit:
            compiled.wait("measure", check, say)
            state = _measure(config, source, plan, state, data, mesh)
            keeper.hold(state)
    first = max(done - of_fit, 0)
    encodings = steps.precompute_item_embeddings(state, source.items, plan)
    encodings = None if encodings is None else sharding.put_replicated(encodings, mesh)

    def update(*args):
        return steps.update_step(*args, encodings)

    state = run(state, "train", "train", update, first, of_updates)
    rows: dict[str, Any] = {}

    def alone() -> tuple[configs.Run, sources.Source, steps.TrainConfig, Any, SessionLog]:
        return (config, _alone(source), plan, sharding.local(state), data.log)

    if plan.use_feedback_model and config.alternation.gap_sessions and source.sim is not None:
        phase("optimism")
        compiled.wait("A/B test", check, say)
        rows["optimism"] = evaluate.optimism(*alone(), sharding.local_mesh(), policies)
    if config.alternation.conflict_batches:
        phase("conflict")
        rows["conflict"] = run_report.conflicts(*alone())
    for name, metrics in rows.items():  # once nothing can stop the round any more
        keeper.write(name, metrics)
    return state


def _measure(
    config: configs.Run, source, plan: steps.TrainConfig, state, data: batches.Batches, mesh
) -> steps.TrainState:
    """The state with the feedback model's uncertainty scaled on the sessions held out, or on later days, where it is
    also calibrated. Each process measures alone."""
    valid = source.valid is not None
    if valid:
        log = source.valid()
        held = sessions.segment_index(log, config.train.segment)
    else:
        log, held = data.held_out()
    model, blocks = sharding.local(steps.model_of(state)), _blocks(log, held, config, plan.feedback.exposures)
    found = fitting.measure(model, blocks, sharding.local(source.items), plan.feedback, calibrate=valid)
    return dataclasses.replace(state, feedback=sharding.put_replicated(found, mesh))


def _blocks(log: SessionLog, index: np.ndarray, config: configs.Run, exposures: int):
    """Batches of segments spread over the log, at most `_MEASURED` of each kind of exposure.

    A short batch is repeated to a whole one.
    """
    size, random = config.feedback.batch, np.zeros(len(index), bool)
    if exposures == 2:
        random = log.context[log.offsets[index[:, 0]], 0] > 0.5
    for part in (index[~random], index[random]):
        part = part[:: max(len(part) // (_MEASURED * size), 1)]
        blocks = [part[i : i + size] for i in range(0, len(part) - size + 1, size)]
        if len(part) and not blocks:
            blocks = [np.resize(part, (size, 2))]
        for rows in blocks[:_MEASURED]:
            yield sharding.put_batch(sessions.gather_segments(log, rows, config.train.segment), sharding.local_mesh())
