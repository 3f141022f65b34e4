"""The host loop: collect or load logs, train, evaluate, write results. Only this module drives the devices."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrf_jax import types
from mmrf_jax.agents import registry
from mmrf_jax.checkpointing import manager
from mmrf_jax.data import sessions, stream
from mmrf_jax.data.frame_log import FrameLog
from mmrf_jax.data.session_log import SessionLog
from mmrf_jax.envs import base
from mmrf_jax.io import files, metric_writer, profile, trackers
from mmrf_jax.io.progress import check, counted, interruptible, observed, phase, say
from mmrf_jax.models.feedback_model import fitting
from mmrf_jax.parallel import multihost, preemption, programs, sharding
from mmrf_jax.training import (
    batches,
    compilation,
    configs,
    evaluate,
    inputs,
    own_logs,
    provenance,
    restore,
    run_folder,
    run_report,
    sources,
    steps,
    times,
)

_KEEP = 3
_LARGE = 2**22  # array entries; larger arrays are checked on the device
_MEASURED = 16  # batches of held-out sessions on which the feedback model is measured


def train(config: configs.Run, workdir: Path, brief: bool = False, log: FrameLog | None = None) -> dict[str, Any]:
    """Run a config to its results, resuming from the latest checkpoint in the folder; return the results.

    Args:
      brief: whether to skip the report (`mmrf report` can write it later) and, on real logs, the simple rankers that
        the run is compared with, as in a study.
      log: the log of a run on `logs`; None to read the one that the config names.
    """
    # Validate the config before writing anything.
    configs.validate(configs.as_dict(config))
    config, log = own_logs.prepare(config, workdir, log)
    registry.configured(config.method, config.agents)
    profile.parse(config.profile_steps)
    trackers.check(config.trackers)
    mesh = sharding.make_mesh()
    sharding.check_divisible(config.train.batch, mesh, "train.batch")
    sharding.check_divisible(config.feedback.batch, mesh, "feedback.batch")
    if config.source == "world" and config.simulator == "world":
        _arms(config, sources.world_policies())
    with contextlib.ExitStack() as stack:  # the first process holds the folder's lock
        finished = multihost.on_primary(lambda: _begun(stack, workdir, config, brief, log))
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
            return _run(config, workdir, mesh, brief, compiled, spent)


def _begun(
    stack: contextlib.ExitStack, workdir: Path, config, brief: bool, log: FrameLog | None
) -> dict[str, Any] | None:
    """Return the results of a finished run; otherwise lock its folder until the stack closes and return None.

    Stores the log of a run on `logs`, so that the folder is complete without its source.
    """
    results = _read_if_exists(workdir / "results.json")
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


def check_arms(names: Iterable[str], policies: Collection[str], field: str) -> None:
    """Refuse names in a config field that are not policies.

    Raises:
      ValueError: for the first such name.
    """
    for name in names:
        if name not in policies:
            raise ValueError(f"unknown arm {name!r} in {field}; choose among {', '.join(policies)}")


def _run(config, workdir: Path, mesh, brief: bool, compiled: programs.Ahead, spent: times.Times) -> dict[str, Any]:
    """Run everything from a claimed folder to its results. Each process computes the same process-local evaluations."""
    phase("prepare")
    with preemption.at_once():
        source = restore.source_of(config, mesh, collects=config.alternation.closed_loop, workdir=workdir)
    plan = steps.plan_of(config, source.spec.signals)
    if source.report:
        say(f"input: {json.dumps(source.report, default=str)}")
    if sharding.is_primary():
        inputs.write(workdir, inputs.of_source(_alone(source)))
    policies = {} if source.sim is None else _arms(config, source.policies)
    with manager.Checkpoints(
        workdir / "checkpoints", keep=_KEEP, save_interval=config.checkpoint_every, agree=multihost.on_primary
    ) as checkpoints:
        state, metrics = _learn(config, source, plan, workdir, checkpoints, mesh, compiled, policies)
    result = multihost.on_primary(lambda: _read_if_exists(workdir / "results.json"))  # if stopped at the report before
    with preemption.at_once():
        if result is None:
            result = {"train": metrics}
            if source.sim is not None:
                result |= _ab_test(config, source, plan, policies, state, mesh, workdir, compiled)
            result |= _offline(config, source, state, brief, compiled)
            phase("results")
            if sharding.is_primary():
                files.write_json(workdir / "results.json", result)
                _write_end(config, workdir, metrics["steps"], spent.seconds(), result)
        if not brief:
            source, state = _alone(source), sharding.local(state)
            source.test()  # a collective operation if the test log has not been collected yet
            preemption.part()
            if sharding.is_primary():
                _report(config, source, state, workdir)
    return result


def _writer(config: configs.Run, workdir: Path | None, start_step: int | None) -> metric_writer.MetricsWriter:
    return metric_writer.MetricsWriter(
        workdir, start_step, seed=config.seed, track=config.trackers, config=configs.as_dict(config)
    )


def _write_end(
    config: configs.Run, workdir: Path, step: int, seconds: dict[str, float], result: Mapping[str, Any]
) -> None:
    """Log this process's times, as a line and as a row of metrics.jsonl, and the results, to the trackers."""
    say(times.describe(seconds))
    with _writer(config, workdir, step) as writer:
        writer.write(step, "time", {f"seconds_{kind}": round(value, 3) for kind, value in seconds.items()})
        writer.summarise(run_report.headline(config, result))


def _ab_test(
    config: configs.Run,
    source: sources.Source,
    plan: steps.TrainConfig,
    policies: dict[str, base.Policy],
    state: steps.TrainState,
    mesh,
    workdir: Path,
    compiled: programs.Ahead,
) -> dict[str, Any]:
    """Compare a trained state with the other arms; the per-user sums of its arm go to the run folder."""
    phase("ab_test")
    compiled.wait("A/B test", check, say)
    own = registry.get(plan.method).make_policy(state.agents, source.items, plan.agents)
    blocks: list[Mapping[str, np.ndarray]] = []
    result = evaluate.compare(
        config,
        source,
        policies | {config.method: own},
        mesh,
        observe=lambda sums: blocks.append(sums[config.method]),
    )
    if sharding.is_primary():
        run_folder.write_users(workdir, blocks)
    return result


def _offline(
    config: configs.Run, source: sources.Source, state: steps.TrainState, brief: bool, compiled: programs.Ahead
) -> dict[str, Any]:
    """Evaluate a trained state on the held-out logs."""
    phase("offline")
    compiled.wait("offline", check, say)
    return evaluate.evaluate(
        config, _alone(source), sharding.local(state), sharding.local_mesh(), with_baselines=not brief
    )


def _alone(source: sources.Source) -> sources.Source:
    """Return the source with its items on this process's devices only."""
    return dataclasses.replace(source, items=sharding.local(source.items))


def _report(config: configs.Run, source: sources.Source, state: steps.TrainState, workdir: Path) -> None:
    """Write the run's report. The results are already saved, so any error here is only logged."""
    if (missing := run_report.missing()) is not None:
        say(f"no report: {missing}, then mmrf report --workdir={workdir}")
        return
    try:
        phase("report")
        run_report.write_report(config, source, state, workdir, thorough=False)
    except Exception as error:
        fix = f"mmrf report --workdir={workdir} tries again"
        say(f"no report: {type(error).__name__}: {error}; {fix}")


def _arms(config: configs.Run, policies: dict[str, base.Policy]) -> dict[str, base.Policy]:
    """Return the config's arms, except the run's own ranker, which is added later."""
    names = [name for name in config.ab_test.arms if name != config.method]
    check_arms(names, policies, "config.ab_test.arms")
    return {name: policies[name] for name in names}


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _finite(tree) -> bool:
    """Return whether every floating-point number of a state is finite; all processes agree."""
    for x in jax.tree.leaves(tree):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        # Checking small arrays on the host avoids compiling a program for each; large ones may be sharded.
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
    """Train all rounds of a run, from the latest checkpoint or a new state to the last update."""
    state: Any = None
    summary: dict[str, Any] | None
    step, shapes = 0, restore.state_shapes(config, source, mesh)
    if checkpoints.latest_step() is not None:
        state, step = checkpoints.restore(shapes)
        say(f"resumed at step {step}, round {min(int(state.round) + 1, plan.rounds)}")
        summary = multihost.on_primary(lambda: _read_if_exists(workdir / "learned.json"))
        if summary is not None and summary["steps"] == step:
            return state, summary
    start = compilation.initial(shapes) if state is None else None
    compilation.begin(compiled, config, plan, source, shapes, start, policies, mesh)
    writes = workdir if sharding.is_primary() else None
    writer = _writer(config, writes, step if step else None)
    hooks = _RunHooks(config, writer, checkpoints, step)
    traced = profile.Profile(config.profile_steps, writes and writes / "profile")
    given: batches.Batches | None = None
    with writer, hooks, contextlib.closing(traced):
        for number in range(0 if state is None else int(state.round), plan.rounds):
            if number == 0 or not plan.closed_loop:
                if given is None:
                    if source.sim is not None:
                        phase("read" if isinstance(config.data, configs.OwnLogs) or config.data.dir else "collect")
                    with preemption.at_once():
                        given = _load_log(config, plan, source, mesh)
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
            hooks.hold(state)
            state = _round(config, source, plan, state, data, hooks, traced, mesh, compiled, policies)
            state = steps.next_round(state)
            hooks.hold(state)
            hooks.save(force=True, again=True)
    checkpoints.wait()
    summary = multihost.on_primary(lambda: _summarise(plan, state, workdir, hooks.step))
    return state, summary


def _summarise(plan: steps.TrainConfig, state: steps.TrainState, workdir: Path, step: int) -> dict[str, Any]:
    """Write learned.json of a run that has finished training, and return its contents."""
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
        "model_exploitation_gap": [plain(row) for row in rows if row["phase"] == "model_exploitation_gap"],
        "conflict": [plain(row) for row in rows if row["phase"] == "conflict"],
        "final": plain(next(row for row in reversed(rows) if row["phase"] == "train")),
    }
    files.write_json(workdir / "learned.json", summary)
    return summary


def _server(
    config: configs.Run, plan: steps.TrainConfig, source: sources.Source, state: steps.TrainState
) -> base.Policy:
    """Return the policy that collects a round's log, local to this process: the agents as of the round's start, or the
    source's first policy.
    """
    method = registry.get(plan.method)
    if not method.collects:
        return next(iter(source.policies.values()))
    server = steps.behavior_state(sharding.local(state))
    return method.make_policy(server, _alone(source).items, plan.agents, config.alternation.temperature)


def _load_log(config: configs.Run, plan: steps.TrainConfig, source: sources.Source, mesh) -> batches.Batches:
    """Return the batches of the first round's log, or of the log of all rounds; streamed if the source says so."""
    if (blocks := source.blocks()) is not None:
        return batches.Streamed(config, blocks, mesh, plan.agents.discount, len(plan.agents.all_signals))
    return batches.Held(config, source.train(), mesh)


class _RunHooks:
    """Writes metrics and checkpoints of a run after its steps; never saves a state that is not finite.

    As a context manager it saves its current state when the run is preempted.
    """

    def __init__(
        self, config: configs.Run, writer: metric_writer.MetricsWriter, checkpoints: manager.Checkpoints, step: int
    ):
        self.step = step  # steps of the whole run: fits and updates
        self._config, self._writer, self._checkpoints = config, writer, checkpoints
        self._state: Any = None
        self._pending: tuple[int, str, Any] | None = None
        self._good = step  # the last step whose metrics were finite

    def __enter__(self) -> _RunHooks:
        return self

    def __exit__(self, kind, *_: object) -> None:
        if kind is preemption.Preempted and self._state is not None:
            self.save(force=True)
            self._checkpoints.wait()
            say(f"saved step {self.step}")

    def hold(self, state) -> None:
        """Set the run's current state."""
        self._state = state

    def after_step(self, phase: str, metrics, last: bool) -> None:
        self.step += 1
        if self.step % self._config.log_every == 0 or last:
            # Write the metrics of the previous logging step: reading those does not block on the device.
            self.flush()
            self._pending = (self.step, phase, metrics)
        if last:
            self.flush()

    def flush(self) -> None:
        """Write the metrics that are still on the device."""
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
            first = min(self._good + 1, self.step)  # its metrics may be finite nevertheless
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
    hooks: _RunHooks,
    traced,
    mesh,
    compiled: programs.Ahead,
    policies: dict[str, base.Policy],
):
    """Run one round: the remaining steps of its fit and its updates, then the model exploitation gap."""
    number, done = int(state.round), int(state.done)
    of_fit = config.feedback.epochs * data.per_epoch("feedback") if plan.use_feedback_model else 0
    of_updates = config.train.epochs * data.per_epoch("train")

    def run(state, name: str, part: str, step, first: int, total: int):
        """Run steps `first` … `total - 1` of a phase of this round; learning rates decay over the whole run."""
        if first < total:
            phase(name)
            compiled.wait(name, check, say)
        update = counted(f"{name} {number + 1}/{plan.rounds}", total, done=first)
        with stream.ahead(lambda at: data.get(part, number, at), first, total) as coming:
            for at, batch in enumerate(coming, first):
                rate = np.float32(steps.rate((number + at / total) / plan.rounds))
                traced.before(hooks.step + 1)
                state, metrics = step(state, sharding.put_batch(batch, mesh), source.items, plan, rate)
                hooks.hold(state)
                traced.after(hooks.step + 1, state)
                hooks.after_step(name, metrics, last=at + 1 == total)
                if name == "fit" or at + 1 < total:  # the last update is saved at the end of the round
                    hooks.save()
                update(at + 1)
        return state

    if plan.use_feedback_model:
        state = run(state, "fit", "feedback", steps.fit_step, done, of_fit)
        if done <= of_fit:
            compiled.wait("measure", check, say)
            state = _measure(config, source, plan, state, data, mesh)
            hooks.hold(state)
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
        phase("model_exploitation_gap")
        compiled.wait("A/B test", check, say)
        rows["model_exploitation_gap"] = evaluate.model_exploitation_gap(*alone(), sharding.local_mesh(), policies)
    if config.alternation.conflict_batches:
        phase("conflict")
        rows["conflict"] = run_report.conflicts(*alone())
    for name, metrics in rows.items():  # written last, after everything that can be interrupted
        hooks.write(name, metrics)
    return state


def _measure(
    config: configs.Run, source, plan: steps.TrainConfig, state, data: batches.Batches, mesh
) -> steps.TrainState:
    """Scale the feedback model's uncertainty on held-out sessions, or on validation days, which also calibrate it.

    Each process measures alone.
    """
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
    """Yield batches of segments spread over the log, at most `_MEASURED` per exposure type.

    A short batch is padded by repetition.
    """
    size, random = config.feedback.batch, np.zeros(len(index), bool)
    if exposures == 2:
        random = types.exposed_at_random(log.context[log.offsets[index[:, 0]]])
    for part in (index[~random], index[random]):
        part = part[:: max(len(part) // (_MEASURED * size), 1)]
        blocks = [part[i : i + size] for i in range(0, len(part) - size + 1, size)]
        if len(part) and not blocks:
            blocks = [np.resize(part, (size, 2))]
        for rows in blocks[:_MEASURED]:
            yield sharding.put_batch(sessions.gather_segments(log, rows, config.train.segment), sharding.local_mesh())
